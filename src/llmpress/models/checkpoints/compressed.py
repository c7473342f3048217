"""What config.json says of compression: which checkpoints and which of their layers have it."""

from collections.abc import Mapping
from typing import Any

import torch

from llmpress.models.checkpoints.files import Checkpoint, stored_dtype
from llmpress.models.quantizer import (
    FORMAT_VERSION,
    LLMPressConfig,
    check_format,
    own_quantization,
)

KEY = "quantization_config"
DENSE_DTYPE = torch.bfloat16
"""What a linear is stored in that a method leaves dense, where the original's takes more bits."""


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was written by llmpress."""
    return bool(compressed_layers(checkpoint))


def compressed_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the `llmpress.nn.layers.layer_entry` of each compressed layer, none of a plain model.

    Raises:
        ArtifactError: An artifact of another format version.
    """
    quantization = own_quantization(checkpoint.config)
    if quantization is None:
        return {}
    check_format(quantization.get("format_version", 0))
    return dict(quantization["layers"])


def kept_dtype(own: torch.dtype, *, linear: bool) -> torch.dtype:
    """Return what a tensor that is not compressed is stored in: what the original has it in.

    A ``linear`` of a decoder block that a method leaves dense takes 16 bits a weight at most.
    """
    return DENSE_DTYPE if linear and own.itemsize > DENSE_DTYPE.itemsize else own


def model_config(
    source: Checkpoint,
    dtype: torch.dtype | None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the content of config.json for what is made of a model.

    Args:
        source: The model; how it is compressed itself is left out, and what code of its own it
            names, which is never run and does not come along.
        dtype: What transformers loads its plain tensors in; None for what it loads the model in.
        layers: Entries as `compressed_layers` returns them; None for a plain model.
    """
    config = source.plain_config()
    config.pop(KEY, None)
    config.pop("auto_map", None)
    own = config.get("dtype") or stored_dtype(source)
    config["dtype"] = str(dtype or own).removeprefix("torch.")
    return config if layers is None else config | quantization(layers)


def quantization(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of config.json that lists the compressed layers."""
    return {KEY: LLMPressConfig(layers, FORMAT_VERSION).to_dict()}
