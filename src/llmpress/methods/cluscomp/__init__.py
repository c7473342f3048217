"""ClusComp."""

from llmpress.methods.cluscomp.method import ClusComp

__all__ = ["ClusComp"]
