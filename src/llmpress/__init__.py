"""Compress large language models and their fine-tuning deltas, and measure what was lost.

    import llmpress
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("data/finetuned/cluscomp-2p6bit-tuned")
    model = llmpress.load_finetuned("data/models/smollm2", "data/compressed/delta-come")

Importing this costs nothing: the format is registered when transformers is used, and the names
below are imported when they are first asked for. Every stage of the pipeline imports this file, so
it stays small and names its parts as text; see docs/decisions/0006-import-llmpress.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmpress.registration import register

if TYPE_CHECKING:
    from llmpress.delta_bank import DeltaBank
    from llmpress.deltas import load_delta, load_finetuned, remove_delta
    from llmpress.errors import LLMPressError
    from llmpress.export import export_dense, export_factors
    from llmpress.hf import dequantized, load_model, load_tokenizer
    from llmpress.hub_artifacts import fetch_artifact, push_artifact
    from llmpress.layers import dense_bytes
    from llmpress.model_compression import compress_model
    from llmpress.runs import build_method

_WHERE = {
    "DeltaBank": "llmpress.delta_bank",
    "LLMPressError": "llmpress.errors",
    "build_method": "llmpress.runs",
    "compress_model": "llmpress.model_compression",
    "dense_bytes": "llmpress.layers",
    "dequantized": "llmpress.hf",
    "export_dense": "llmpress.export",
    "export_factors": "llmpress.export",
    "fetch_artifact": "llmpress.hub_artifacts",
    "load_delta": "llmpress.deltas",
    "load_finetuned": "llmpress.deltas",
    "load_model": "llmpress.hf",
    "load_tokenizer": "llmpress.hf",
    "push_artifact": "llmpress.hub_artifacts",
    "remove_delta": "llmpress.deltas",
}

__all__ = [
    "DeltaBank",
    "LLMPressError",
    "build_method",
    "compress_model",
    "dense_bytes",
    "dequantized",
    "export_dense",
    "export_factors",
    "fetch_artifact",
    "load_delta",
    "load_finetuned",
    "load_model",
    "load_tokenizer",
    "push_artifact",
    "remove_delta",
]

register()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
