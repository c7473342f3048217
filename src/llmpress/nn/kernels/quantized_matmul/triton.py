"""``y = x · Wᵀ`` from packed codes, unpacked in registers.

A program makes ``BLOCK_O`` outputs for ``BLOCK_M`` rows from a part of the input channels and reads
each packed code once. A single row is multiplied without tensor cores.

What bounds such a product are the instructions that unpack a weight rather than its bytes. Where
rows and scale groups consist of whole runs of 32 codes, which are as many words of 32 bits as a
code has bits, a kernel takes them run by run; elsewhere another one finds every code by itself,
with four to eight times as many instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import aligned, load_codes
from llmpress.nn.kernels.dispatch import num_splits, on_its_device
from llmpress.nn.kernels.runs import RUN, product_with_runs
from llmpress.nn.kernels.tiles import operand_dtype, rows_of_tile

LEAST_INPUTS = 256
"""Input channels that a part of a split sum has at least."""


@triton.jit
def _quantized_runs_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    split_size,
    stride_xm,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    pid_o, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m, mask_o = offs_m < num_rows, offs_o < out_features
    start = pid_s * split_size
    acc = product_with_runs(
        x_ptr + offs_m.to(tl.int64) * stride_xm,
        mask_m,
        codes_ptr,
        scales_ptr,
        zeros_ptr,
        offs_o,
        mask_o,
        in_features,
        start,
        min(start + split_size, in_features),
        GROUP_SIZE,
        NUM_BITS,
        OPERAND,
        BLOCK_M,
        BLOCK_I,
        BLOCK_O,
    )
    row_start = (pid_s * num_rows + offs_m).to(tl.int64) * out_features
    tl.store(
        out_ptr + row_start[:, None] + offs_o[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_o[None, :],
    )


@triton.jit
def _quantized_matmul_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    split_size,
    stride_xm,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    pid_o, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m, mask_o = offs_m < num_rows, offs_o < out_features
    start = pid_s * split_size
    stop = min(start + split_size, in_features)
    num_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    row_o = offs_o[:, None].to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for first in range(start, stop, BLOCK_I):
        offs_i = first + tl.arange(0, BLOCK_I)
        mask_i = offs_i < stop
        mask = mask_o[:, None] & mask_i[None, :]
        codes = load_codes(codes_ptr, row_o * in_features + offs_i[None, :], mask, NUM_BITS)
        if GROUP_SIZE % BLOCK_I == 0:  # one group for all of them
            group = row_o * num_groups + first // GROUP_SIZE
            scales = tl.load(scales_ptr + group, mask=mask_o[:, None], other=0)
            zeros = load_codes(zeros_ptr, group, mask_o[:, None], NUM_BITS)
        else:
            group = row_o * num_groups + offs_i[None, :] // GROUP_SIZE
            scales = tl.load(scales_ptr + group, mask=mask, other=0)
            zeros = load_codes(zeros_ptr, group, mask, NUM_BITS)
        weight = (codes - zeros).to(tl.float32) * scales.to(tl.float32)
        weight = tl.where(mask, weight, 0.0)
        x = tl.load(
            x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_i[None, :],
            mask=mask_m[:, None] & mask_i[None, :],
            other=0,
        )
        if BLOCK_M == 1:
            acc += tl.reshape(tl.sum(weight * x.to(tl.float32), axis=1), [1, BLOCK_O])
        else:
            weight = weight.to(x_ptr.dtype.element_ty).to(OPERAND)
            acc = tl.dot(x.to(OPERAND), tl.trans(weight), acc, input_precision="ieee")
    row_start = (pid_s * num_rows + offs_m).to(tl.int64) * out_features
    tl.store(
        out_ptr + row_start[:, None] + offs_o[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_o[None, :],
    )


@on_its_device
def quantized_matmul_triton(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]`` in the dtype of ``x [M, in]``; sums are fp32."""
    num_rows, in_features = x.shape
    out_features = scales.shape[0]
    block_m = rows_of_tile(num_rows)
    in_runs = in_features % RUN == 0 and group_size % RUN == 0
    if in_runs:
        kernel, block_o, block_i = _quantized_runs_kernel, 64, RUN * (8 if block_m == 1 else 16)
    else:
        kernel, block_o, block_i = _quantized_matmul_kernel, 32, 64
    # More threads where a tile of rows would not leave each of them enough registers.
    num_warps = 8 if block_m == 64 or (block_m > 1 and x.dtype == torch.float32) else 4
    rows, tiles = triton.cdiv(num_rows, block_m), triton.cdiv(out_features, block_o)
    splits = num_splits(rows * tiles, triton.cdiv(in_features, LEAST_INPUTS), x.device)
    split_size = triton.cdiv(triton.cdiv(in_features, splits), block_i) * block_i
    splits = triton.cdiv(in_features, split_size)
    dtype = x.dtype if splits == 1 else torch.float32
    out = x.new_empty(splits, num_rows, out_features, dtype=dtype)
    kernel[(tiles, rows, splits)](
        x,
        aligned(codes, 4),
        scales,
        zero_points,
        out,
        num_rows,
        in_features,
        out_features,
        split_size,
        x.stride(0),
        GROUP_SIZE=group_size,
        NUM_BITS=num_bits,
        OPERAND=operand_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
        num_warps=num_warps,
    )
    return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
