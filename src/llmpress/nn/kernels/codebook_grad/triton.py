"""The gradient of a codebook without the dense gradient of the weight.

A program makes one tile of ``xᵀ g`` for ``BLOCK_I`` inputs and ``BLOCK_J`` vectors of outputs in
registers and adds its vectors to their entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import aligned, load_codes
from llmpress.nn.kernels.dispatch import on_its_device
from llmpress.nn.kernels.tiles import operand_dtype, padded_size
from llmpress.nn.packing import code_width


@triton.jit
def _codebook_grad_kernel(
    x_ptr,
    gradient_ptr,
    codes_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    num_columns,
    stride_xm,
    stride_gm,
    VECTOR_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCK_J * PADDED_SIZE
    pid_i, pid_j = tl.program_id(0), tl.program_id(1)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_n = tl.arange(0, BLOCK_N)
    entry = offs_n % PADDED_SIZE
    column = pid_j * BLOCK_J + offs_n // PADDED_SIZE
    channel = column * VECTOR_SIZE + entry
    mask_i = offs_i < in_features
    mask_n = (entry < VECTOR_SIZE) & (channel < out_features)
    acc = tl.zeros([BLOCK_I, BLOCK_N], dtype=tl.float32)
    for first in range(0, num_rows, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_rows
        x = tl.load(
            x_ptr + offs_m[None, :].to(tl.int64) * stride_xm + offs_i[:, None],
            mask=mask_m[None, :] & mask_i[:, None],
            other=0,
        )
        gradient = tl.load(
            gradient_ptr + offs_m[:, None].to(tl.int64) * stride_gm + channel[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0,
        )
        acc = tl.dot(x.to(OPERAND), gradient.to(OPERAND), acc, input_precision="ieee")
    index = offs_i[:, None].to(tl.int64) * num_columns + column[None, :]
    mask = mask_i[:, None] & mask_n[None, :]
    codes = load_codes(codes_ptr, index, mask, NUM_BITS)
    tl.atomic_add(out_ptr + codes * VECTOR_SIZE + entry[None, :], acc, mask=mask)


@on_its_device
def codebook_grad_triton(
    x: Tensor, gradient: Tensor, codes: Tensor, num_entries: int, vector_size: int
) -> Tensor:
    """Return ``dL/dC``, fp32 ``[K, d]``."""
    num_rows, in_features = x.shape
    out_features = gradient.shape[1]
    num_columns = -(-out_features // vector_size)
    padded = padded_size(vector_size)
    block_i, block_j = 32, max(1, 64 // padded)
    out = x.new_zeros(num_entries, vector_size, dtype=torch.float32)
    grid = (triton.cdiv(in_features, block_i), triton.cdiv(num_columns, block_j))
    _codebook_grad_kernel[grid](
        x,
        gradient,
        aligned(codes, 2),
        out,
        num_rows,
        in_features,
        out_features,
        num_columns,
        x.stride(0),
        gradient.stride(0),
        VECTOR_SIZE=vector_size,
        PADDED_SIZE=padded,
        NUM_BITS=code_width(num_entries),
        OPERAND=operand_dtype(x.dtype),
        BLOCK_M=min(64, max(16, padded_size(num_rows))),
        BLOCK_I=block_i,
        BLOCK_J=block_j,
    )
    return out
