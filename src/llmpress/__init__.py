"""Compress large language models and their fine-tuning deltas, and measure what was lost.

    import llmpress

    llmpress.compress_model("models/mine", method="cluscomp", bits=2.6, text=[text], out="small")
    llmpress.compare_models("models/mine", "small", text=[other_text])
    model = llmpress.load_model("small")  # or transformers' from_pretrained

Folders come first, all else by keyword. What writes a folder takes ``out=`` and returns its path;
nothing is replaced without ``force=True``, and nothing is left half-written.

Importing this costs nothing: the format is registered when transformers is used, and the names
below are imported when they are first asked for. Every Python where llmpress is installed imports
this file, so it is small and names its parts as text; see docs/decisions/0006-import-llmpress.md.
"""

from __future__ import annotations

from llmpress.core.registration import register

TYPE_CHECKING = False  # `typing` would be imported at the start of every Python; see llmpress.pth
if TYPE_CHECKING:
    from llmpress.calibration.stage import calibrate_model
    from llmpress.compression.stage import compress_model
    from llmpress.core.errors import LLMPressError
    from llmpress.data.sources.pretrained import fetch_model
    from llmpress.deltas.applying import load_delta, load_finetuned, remove_delta
    from llmpress.deltas.compression import compress_delta
    from llmpress.deltas.extraction import extract_delta
    from llmpress.evaluation.comparison import compare_models
    from llmpress.evaluation.inspection import describe
    from llmpress.evaluation.reference import make_reference
    from llmpress.evaluation.stage import evaluate_model
    from llmpress.export.adapter import export_adapter
    from llmpress.export.dense import export_dense
    from llmpress.export.factors import export_factors
    from llmpress.export.hub import fetch_artifact, push_artifact
    from llmpress.export.packed import export_packed
    from llmpress.methods.registry import build_method, known_methods, method_class
    from llmpress.models.loading import dequantized, load_model, load_tokenizer
    from llmpress.nn.layers import dense_bytes
    from llmpress.serving.bank import DeltaBank
    from llmpress.training.stage import train_model
    from llmpress.tuning.stage import finetune_model

_WHERE = {
    "DeltaBank": "llmpress.serving.bank",
    "LLMPressError": "llmpress.core.errors",
    "build_method": "llmpress.methods.registry",
    "calibrate_model": "llmpress.calibration.stage",
    "compare_models": "llmpress.evaluation.comparison",
    "compress_delta": "llmpress.deltas.compression",
    "compress_model": "llmpress.compression.stage",
    "dense_bytes": "llmpress.nn.layers",
    "dequantized": "llmpress.models.loading",
    "describe": "llmpress.evaluation.inspection",
    "evaluate_model": "llmpress.evaluation.stage",
    "export_adapter": "llmpress.export.adapter",
    "export_dense": "llmpress.export.dense",
    "export_factors": "llmpress.export.factors",
    "export_packed": "llmpress.export.packed",
    "extract_delta": "llmpress.deltas.extraction",
    "fetch_artifact": "llmpress.export.hub",
    "fetch_model": "llmpress.data.sources.pretrained",
    "finetune_model": "llmpress.tuning.stage",
    "known_methods": "llmpress.methods.registry",
    "load_delta": "llmpress.deltas.applying",
    "load_finetuned": "llmpress.deltas.applying",
    "load_model": "llmpress.models.loading",
    "load_tokenizer": "llmpress.models.loading",
    "make_reference": "llmpress.evaluation.reference",
    "method_class": "llmpress.methods.registry",
    "push_artifact": "llmpress.export.hub",
    "remove_delta": "llmpress.deltas.applying",
    "train_model": "llmpress.training.stage",
}

__all__ = [
    "DeltaBank",
    "LLMPressError",
    "build_method",
    "calibrate_model",
    "compare_models",
    "compress_delta",
    "compress_model",
    "dense_bytes",
    "dequantized",
    "describe",
    "evaluate_model",
    "export_adapter",
    "export_dense",
    "export_factors",
    "export_packed",
    "extract_delta",
    "fetch_artifact",
    "fetch_model",
    "finetune_model",
    "known_methods",
    "load_delta",
    "load_finetuned",
    "load_model",
    "load_tokenizer",
    "make_reference",
    "method_class",
    "push_artifact",
    "remove_delta",
    "train_model",
]

register()


def __getattr__(name: str) -> object:
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
