"""Round to nearest."""

from llmpress.methods.rtn.method import RTN

__all__ = ["RTN"]
