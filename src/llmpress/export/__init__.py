"""Export: plain checkpoints and adapters for other tools, and artifacts on the hub.

May import from core up to pipeline.
"""
