"""Models: architectures, checkpoints, loading through transformers, the walk by block.

May import from core up to data.
"""
