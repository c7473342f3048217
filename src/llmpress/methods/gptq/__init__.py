"""GPTQ."""

from llmpress.methods.gptq.method import GPTQ

__all__ = ["GPTQ"]
