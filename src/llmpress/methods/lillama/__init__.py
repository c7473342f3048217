"""Lillama."""

from llmpress.methods.lillama.method import Lillama

__all__ = ["Lillama"]
