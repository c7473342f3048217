"""``y = x · Wᵀ`` with a vector-quantized weight that stays packed, and its gradients."""

from typing import Any

import torch
from torch import Tensor

from llmpress.nn.kernels.codebook_grad import codebook_grad
from llmpress.nn.kernels.codebook_matmul.reference import (
    codebook_matmul_reference,
    codebook_weight,
)
from llmpress.nn.kernels.dispatch import uses_triton

MOST_ROWS_PACKED = 16
"""Inputs with more rows are multiplied by the weight written out, on a GPU."""


def transposed_weight(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int
) -> Tensor:
    """Return ``Wᵀ [in, out]`` in the dtype and on the device of ``x [M, in]``."""
    if uses_triton(x):
        from llmpress.nn.kernels.codebook_matmul.dequantize import codebook_weight_triton

        return codebook_weight_triton(codes, codebook, scales, x.shape[1], out_features, x.dtype)
    return codebook_weight(codes, codebook, scales, x.shape[1], out_features).t().to(x.dtype)


@torch.library.custom_op("llmpress::codebook_matmul", mutates_args=())
def codebook_matmul(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int
) -> Tensor:
    """Multiply by a vector-quantized weight.

    Args:
        x: ``[M, in]``, fp16, bf16 or fp32; rows contiguous.
        codes: Packed, uint8, of ``in · ceil(out / d)`` vectors in the order of ``Wᵀ``.
        codebook: ``[K, d]``, int8 or float.
        scales: Factor of each output, ``[out]``, or None.
        out_features: ``out``.

    Returns:
        ``x Wᵀ``, ``[M, out]`` in the dtype of ``x``; sums are fp32.
    """
    if uses_triton(x):
        if x.shape[0] > MOST_ROWS_PACKED:
            return x @ transposed_weight(x, codes, codebook, scales, out_features)
        from llmpress.nn.kernels.codebook_matmul.triton import codebook_matmul_triton

        return codebook_matmul_triton(x, codes, codebook, scales, out_features)
    return codebook_matmul_reference(x, codes, codebook, scales, out_features)


@codebook_matmul.register_fake
def _(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebook, scales, out_features = inputs
    ctx.save_for_backward(x, codes, codebook, scales)
    ctx.out_features = out_features


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebook, scales = ctx.saved_tensors
    needs_x, _, needs_codebook, needs_scales, _ = ctx.needs_input_grad
    to_x = to_codebook = to_scales = None
    gradient = gradient.contiguous()
    if needs_x:
        to_x = gradient @ transposed_weight(x, codes, codebook, scales, ctx.out_features).t()
    if needs_codebook:
        scaled = gradient if scales is None else gradient * scales.to(gradient.dtype)
        found = codebook_grad(x, scaled.contiguous(), codes, *codebook.shape)
        to_codebook = found.to(codebook.dtype)
    if needs_scales:
        unscaled = codebook_matmul(x.float(), codes, codebook, None, ctx.out_features)
        to_scales = (gradient.float() * unscaled).sum(dim=0).to(scales.dtype)
    return to_x, None, to_codebook, to_scales, None


codebook_matmul.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["codebook_matmul"]
