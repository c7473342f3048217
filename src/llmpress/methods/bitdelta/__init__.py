"""BitDelta."""

from llmpress.methods.bitdelta.method import BitDelta

__all__ = ["BitDelta"]
