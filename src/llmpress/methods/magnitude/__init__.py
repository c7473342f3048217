"""Unstructured pruning."""

from llmpress.methods.magnitude.method import Magnitude

__all__ = ["Magnitude"]
