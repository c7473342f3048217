"""A group-quantized weight written out, for products with many rows: those are the library's."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import load_codes
from llmpress.nn.kernels.dispatch import on_its_device


@triton.jit
def _quantized_dequantize_kernel(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    in_features,
    out_features,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_o < out_features)[:, None] & (offs_i < in_features)[None, :]
    row = offs_o[:, None].to(tl.int64)
    num_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    codes = load_codes(codes_ptr, row * in_features + offs_i[None, :], mask, NUM_BITS)
    group = row * num_groups + offs_i[None, :] // GROUP_SIZE
    scales = tl.load(scales_ptr + group, mask=mask, other=0).to(tl.float32)
    zeros = load_codes(zeros_ptr, group, mask, NUM_BITS)
    weight = (codes - zeros).to(tl.float32) * scales
    tl.store(
        out_ptr + row * in_features + offs_i[None, :],
        weight.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@on_its_device
def quantized_weight_triton(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``W [out, in]``, rounded once."""
    out_features = scales.shape[0]
    out = scales.new_empty(out_features, in_features, dtype=dtype)
    block_o, block_i = 4, 256
    _quantized_dequantize_kernel[
        (triton.cdiv(out_features, block_o), triton.cdiv(in_features, block_i))
    ](
        codes,
        scales,
        zero_points,
        out,
        in_features,
        out_features,
        GROUP_SIZE=group_size,
        NUM_BITS=num_bits,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
    )
    return out
