"""Checkpoints that somebody else quantized: their codes are read with their scales, or not at all.

``W = codes · scale`` in fp32, the scale of a tensor, of its rows, or of its blocks. What has scales
of another form is refused by name: codes without their scales are no weights.

Source: the formats ``fp8`` of transformers (``weight_scale_inv``) and ``float-quantized``,
``int-quantized`` and ``naive-quantized`` of compressed-tensors (``weight_scale``,
``weight_zero_point``).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmpress.core.errors import ArtifactError, SourceError
from llmpress.models.checkpoints.lazy import Index, LazyTensor
from llmpress.models.quantizer import QUANT_METHOD

SCALES = {"fp8": ".weight_scale_inv", "compressed-tensors": ".weight_scale"}
"""By quant_method, what a weight's scale is called after its layer."""
ZERO_POINT = ".weight_zero_point"
BESIDE = (*SCALES.values(), ZERO_POINT, ".input_scale", ".activation_scale", ".input_zero_point")
"""What lies beside a weight and is no tensor of the model; inputs are never quantized here."""
FORMATS = (None, "float-quantized", "int-quantized", "naive-quantized")
"""Of compressed-tensors: those that store one code for each weight, in the weight's shape."""
CODES = frozenset(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I16", "U16", "I32", "U32"))
"""What safetensors calls the dtypes that hold no weight by themselves."""


def quantization_of(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """Return how somebody else quantized a model, nothing of a plain one and of llmpress' own.

    Raises:
        SourceError: In a way that is not dequantized here.
    """
    settings = getattr(config, "quantization_config", None) or {}
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = settings.get("quant_method")
    if not settings or method == QUANT_METHOD:
        return {}
    unusual = [key for key in ("transform_config", "sparsity_config") if settings.get(key)]
    if method not in SCALES or settings.get("format") not in FORMATS or unusual:
        named = ", ".join(str(part) for part in (method, settings.get("format"), *unusual) if part)
        raise SourceError(
            f"{folder}: is quantized already ({named}); llmpress dequantizes fp8 with scales, and "
            "compressed-tensors of 8 bits: name the model that it was made from, or dequantize it "
            "with the tool that made it"
        )
    return dict(settings)


def check_codes(folder: Path, dtypes: Mapping[str, str], method: str | None) -> None:
    """Refuse codes without scales.

    Args:
        folder: For the message.
        dtypes: What safetensors calls each tensor's dtype, by name.
        method: How somebody else quantized the model, None of a plain one.

    Raises:
        SourceError: Some tensor holds codes that nothing says the scale of.
    """
    suffix = SCALES.get(str(method))
    for name, dtype in dtypes.items():
        is_weight = name.endswith(".weight") or not name.endswith(BESIDE)
        scale = f"{name.removesuffix('.weight')}{suffix}"
        if dtype in CODES and is_weight and (suffix is None or scale not in dtypes):
            raise SourceError(
                f"{folder}: {name} holds codes ({dtype}) without a scale that is known here; name "
                "the model that it was made from"
            )


def weights_of(
    folder: Path,
    stored: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, LazyTensor]:
    """Return what a quantized model's files hold, unread: weights in the place of their codes.

    Args:
        folder: For the message.
        stored: What the files hold, by its names there.
        settings: What `quantization_of` returned.
        dtype: What transformers dequantizes to, and these say of themselves; they are read in fp32.
    """
    suffix, block = SCALES[settings["quant_method"]], settings.get("weight_block_size")

    def read(name: str, index: Index) -> Tensor:
        layer = name.removesuffix(".weight")
        zero = stored.get(layer + ZERO_POINT)
        parts = (
            stored[name].read(),
            stored[layer + suffix].read(),
            None if zero is None else zero.read(),
        )
        try:
            return dequantized_weight(*parts, block)[index]
        except ValueError as error:
            raise ArtifactError(f"{folder}: {name}: {error}; fetch the model again") from None

    weights = {}
    for name, tensor in stored.items():
        if name.removesuffix(".weight") + suffix in stored and name.endswith(".weight"):
            weights[name] = LazyTensor(tensor.shape, dtype, partial(read, name))
        elif not name.endswith(BESIDE):
            weights[name] = tensor
    return weights


def dequantized_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: tuple[int, int] | None
) -> Tensor:
    """Return the fp32 weight that codes of the same shape stand for.

    Args:
        codes: ``[out, in]``, or of any shape where there is one scale.
        scale: One, or ``[out]``, ``[out, 1]``, or one for each block ``[blocks, blocks]``.
        zero_point: Of the scale's shape, subtracted first.
        block: Rows and columns of a block, of which the last may be cut off; by default the blocks
            of a dimension are of one length.

    Raises:
        ValueError: A scale that does not fit.
    """
    weight = codes.float()
    if zero_point is not None:
        weight = weight - _spread(zero_point, weight.shape, block)
    return weight * _spread(scale, weight.shape, block)


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """Repeat scales so that there is one for each weight, or one for a whole dimension."""
    spread = scale.float()
    if spread.numel() == 1:
        return spread.reshape(())
    if spread.ndim == 1:
        spread = spread.unsqueeze(1)
    fits = scale.dtype != torch.uint8 and spread.ndim == len(shape) == 2  # bytes are exponents
    for dim, (length, count) in enumerate(zip(shape, spread.shape, strict=False) if fits else ()):
        size = block[dim] if block else length // count
        fits = fits and (count == 1 or -(-length // size) == count)
        if fits and count > 1:
            spread = spread.repeat_interleave(size, dim=dim).narrow(dim, 0, length)
    if not fits:
        raise ValueError(f"a scale of {list(scale.shape)} ({scale.dtype}) does not fit {[*shape]}")
    return spread
