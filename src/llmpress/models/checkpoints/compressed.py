"""Which checkpoints llmpress wrote, and which of their layers are compressed."""

from typing import Any

from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.quantizer import QUANT_METHOD, check_format


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was written by llmpress."""
    return bool(compressed_layers(checkpoint))


def compressed_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return kind and spec of each compressed layer of a checkpoint, none for a plain one."""
    quantization = getattr(checkpoint.config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization.get("quant_method") != QUANT_METHOD:
        return {}
    check_format(quantization.get("format_version", 0))
    return dict(quantization["layers"])
