"""A vector-quantized weight written out, for products with many rows: those are the library's."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import aligned, load_codes
from llmpress.nn.kernels.dispatch import on_its_device
from llmpress.nn.kernels.tiles import padded_size
from llmpress.nn.packing import code_width


@triton.jit
def _codebook_dequantize_kernel(
    codes_ptr,
    codebook_ptr,
    scales_ptr,
    out_ptr,
    in_features,
    out_features,
    num_columns,
    VECTOR_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_t = tl.arange(0, PADDED_SIZE)
    mask_ij = (offs_i < in_features)[:, None] & (offs_j < num_columns)[None, :]
    index = offs_i[:, None].to(tl.int64) * num_columns + offs_j[None, :]
    codes = load_codes(codes_ptr, index, mask_ij, NUM_BITS)
    channel = offs_j[:, None] * VECTOR_SIZE + offs_t[None, :]
    mask_n = (offs_t < VECTOR_SIZE)[None, :] & (channel < out_features)
    mask = mask_ij[:, :, None] & mask_n[None, :, :]
    entry_ptr = codebook_ptr + codes[:, :, None] * VECTOR_SIZE + offs_t[None, None, :]
    weight = tl.load(entry_ptr, mask=mask, other=0).to(tl.float32)
    if HAS_SCALES:
        weight *= tl.load(scales_ptr + channel, mask=mask_n, other=0).to(tl.float32)[None, :, :]
    row = offs_i[:, None, None].to(tl.int64) * out_features
    tl.store(out_ptr + row + channel[None, :, :], weight.to(out_ptr.dtype.element_ty), mask=mask)


@on_its_device
def codebook_weight_triton(
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``Wᵀ [in, out]``: what it is in memory in the order of its codes, rounded once."""
    num_entries, vector_size = codebook.shape
    num_columns = -(-out_features // vector_size)
    padded = padded_size(vector_size)
    block_j = max(1, 128 // padded)
    block_i = 8
    out = codebook.new_empty(in_features, out_features, dtype=dtype)
    _codebook_dequantize_kernel[
        (triton.cdiv(in_features, block_i), triton.cdiv(num_columns, block_j))
    ](
        aligned(codes, 2),
        codebook,
        codebook if scales is None else scales,
        out,
        in_features,
        out_features,
        num_columns,
        VECTOR_SIZE=vector_size,
        PADDED_SIZE=padded,
        NUM_BITS=code_width(num_entries),
        HAS_SCALES=scales is not None,
        BLOCK_I=block_i,
        BLOCK_J=block_j,
    )
    return out
