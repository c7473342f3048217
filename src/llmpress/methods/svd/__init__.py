"""Truncated SVD."""

from llmpress.methods.svd.method import SVD

__all__ = ["SVD"]
