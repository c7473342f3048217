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

from llmpress.core.registration import register

if TYPE_CHECKING:
    from llmpress.compression.stage import compress_model
    from llmpress.core.errors import LLMPressError
    from llmpress.deltas.applying import load_delta, load_finetuned, remove_delta
    from llmpress.export.dense import export_dense
    from llmpress.export.factors import export_factors
    from llmpress.export.hub import fetch_artifact, push_artifact
    from llmpress.methods.registry import build_method
    from llmpress.models.loading import dequantized, load_model, load_tokenizer
    from llmpress.nn.layers import dense_bytes
    from llmpress.serving.bank import DeltaBank

_WHERE = {
    "DeltaBank": "llmpress.serving.bank",
    "LLMPressError": "llmpress.core.errors",
    "build_method": "llmpress.methods.registry",
    "compress_model": "llmpress.compression.stage",
    "dense_bytes": "llmpress.nn.layers",
    "dequantized": "llmpress.models.loading",
    "export_dense": "llmpress.export.dense",
    "export_factors": "llmpress.export.factors",
    "fetch_artifact": "llmpress.export.hub",
    "load_delta": "llmpress.deltas.applying",
    "load_finetuned": "llmpress.deltas.applying",
    "load_model": "llmpress.models.loading",
    "load_tokenizer": "llmpress.models.loading",
    "push_artifact": "llmpress.export.hub",
    "remove_delta": "llmpress.deltas.applying",
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
