"""``y = x · Wᵀ`` with a group-quantized weight that stays packed."""

from typing import Any

import torch
from torch import Tensor

from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.kernels.quantized_matmul.reference import (
    quantized_matmul_reference,
    quantized_weight,
)

MOST_ROWS_PACKED = 16
"""Inputs with more rows are multiplied by the weight written out, on a GPU."""


@torch.library.custom_op("llmpress::quantized_matmul", mutates_args=())
def quantized_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
) -> Tensor:
    """Multiply by a group-quantized weight.

    Args:
        x: ``[M, in]``, fp16, bf16 or fp32; rows contiguous.
        codes: Packed, uint8, of ``[out, in]`` integers.
        scales: ``[out, G]``, ``G = ceil(in / group_size)``.
        zero_points: Packed, uint8, of ``[out, G]`` integers.
        num_bits: Bits of a code and of a zero point, 1 to 8.
        group_size: Consecutive inputs that share a scale and a zero point.

    Returns:
        ``x Wᵀ``, ``[M, out]`` in the dtype of ``x``; sums are fp32.
    """
    if uses_triton(x):
        if x.shape[0] > MOST_ROWS_PACKED:
            from llmpress.nn.kernels.quantized_matmul.dequantize import quantized_weight_triton

            stored = codes, scales, zero_points, num_bits, group_size
            return x @ quantized_weight_triton(*stored, x.shape[1], x.dtype).t()
        from llmpress.nn.kernels.quantized_matmul.triton import quantized_matmul_triton

        return quantized_matmul_triton(x, codes, scales, zero_points, num_bits, group_size)
    return quantized_matmul_reference(x, codes, scales, zero_points, num_bits, group_size)


@quantized_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *stored, ctx.num_bits, ctx.group_size = inputs
    ctx.save_for_backward(*stored)
    ctx.in_features = x.shape[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, zero_points = ctx.saved_tensors
    widths = ctx.num_bits, ctx.group_size, ctx.in_features
    weight = quantized_weight(codes, scales, zero_points, *widths)
    return gradient @ weight.to(gradient.dtype), None, None, None, None, None


quantized_matmul.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["quantized_matmul"]
