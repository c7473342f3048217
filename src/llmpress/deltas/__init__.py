"""Deltas, fine-tuned minus base: extracted, compressed, and put back on a base.

May import from core up to compression.
"""
