"""``y = x · Wᵀ`` from packed codes and a codebook, in registers.

A program makes ``BLOCK_J`` vectors of outputs for ``BLOCK_M`` rows from a part of the input
channels. It reads each packed code once; the codebook comes from the caches. A single row is
multiplied without tensor cores, as it is bound by the codes; several rows go through them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import aligned, load_codes
from llmpress.nn.kernels.dispatch import num_splits, on_its_device
from llmpress.nn.kernels.tiles import operand_dtype, padded_size, rows_of_tile
from llmpress.nn.packing import code_width

LEAST_INPUTS = 128
"""Input channels that a part of a split sum has at least."""


@triton.jit
def _codebook_matmul_kernel(
    x_ptr,
    codes_ptr,
    codebook_ptr,
    scales_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    num_columns,
    split_size,
    stride_xm,
    VECTOR_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCK_J * PADDED_SIZE
    pid_j, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = pid_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_t = tl.arange(0, PADDED_SIZE)
    mask_m, mask_j = offs_m < num_rows, offs_j < num_columns
    start = pid_s * split_size
    stop = min(start + split_size, in_features)
    row_acc = tl.zeros([BLOCK_I, BLOCK_J, PADDED_SIZE], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(start, stop, BLOCK_I):
        offs_i = first + tl.arange(0, BLOCK_I)
        mask_i = offs_i < stop
        mask_ij = mask_i[:, None] & mask_j[None, :]
        index = offs_i[:, None].to(tl.int64) * num_columns + offs_j[None, :]
        codes = load_codes(codes_ptr, index, mask_ij, NUM_BITS)
        vectors = tl.load(
            codebook_ptr + codes[:, :, None] * VECTOR_SIZE + offs_t[None, None, :],
            mask=mask_ij[:, :, None] & (offs_t < VECTOR_SIZE)[None, None, :],
            other=0,
        ).to(tl.float32)
        vectors = vectors.to(x_ptr.dtype.element_ty)
        x = tl.load(
            x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_i[None, :],
            mask=mask_m[:, None] & mask_i[None, :],
            other=0,
        )
        if BLOCK_M == 1:
            row = tl.reshape(x, [BLOCK_I]).to(tl.float32)
            row_acc += vectors.to(tl.float32) * row[:, None, None]
        else:
            weight = tl.reshape(vectors, [BLOCK_I, BLOCK_N])
            acc = tl.dot(x.to(OPERAND), weight.to(OPERAND), acc, input_precision="ieee")
    if BLOCK_M == 1:
        acc = tl.reshape(tl.sum(row_acc, axis=0), [1, BLOCK_N])
    offs_n = tl.arange(0, BLOCK_N)
    entry = offs_n % PADDED_SIZE
    channel = (pid_j * BLOCK_J + offs_n // PADDED_SIZE) * VECTOR_SIZE + entry
    mask_n = (entry < VECTOR_SIZE) & (channel < out_features)
    if HAS_SCALES:
        acc *= tl.load(scales_ptr + channel, mask=mask_n, other=0).to(tl.float32)[None, :]
    row_start = (pid_s * num_rows + offs_m).to(tl.int64) * out_features
    tl.store(
        out_ptr + row_start[:, None] + channel[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@on_its_device
def codebook_matmul_triton(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]`` in the dtype of ``x [M, in]``; sums are fp32.

    Entries of the codebook are rounded to the dtype of ``x``; scales are not.
    """
    num_rows, in_features = x.shape
    num_entries, vector_size = codebook.shape
    num_columns = -(-out_features // vector_size)
    padded = padded_size(vector_size)
    block_m = rows_of_tile(num_rows)
    block_j = max(1, 128 // padded)
    block_i = 32
    programs = triton.cdiv(num_columns, block_j) * triton.cdiv(num_rows, block_m)
    splits = num_splits(programs, triton.cdiv(in_features, LEAST_INPUTS), x.device)
    split_size = triton.cdiv(triton.cdiv(in_features, splits), block_i) * block_i
    splits = triton.cdiv(in_features, split_size)
    dtype = x.dtype if splits == 1 else torch.float32
    out = x.new_empty(splits, num_rows, out_features, dtype=dtype)
    grid = (triton.cdiv(num_columns, block_j), triton.cdiv(num_rows, block_m), splits)
    _codebook_matmul_kernel[grid](
        x,
        aligned(codes, 2),
        codebook,
        codebook if scales is None else scales,
        out,
        num_rows,
        in_features,
        out_features,
        num_columns,
        split_size,
        x.stride(0),
        VECTOR_SIZE=vector_size,
        PADDED_SIZE=padded,
        NUM_BITS=code_width(num_entries),
        HAS_SCALES=scales is not None,
        OPERAND=operand_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_I=block_i,
        BLOCK_J=block_j,
    )
    return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
