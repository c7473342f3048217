"""Delta-CoMe."""

from llmpress.methods.delta_come.method import DeltaCoMe

__all__ = ["DeltaCoMe"]
