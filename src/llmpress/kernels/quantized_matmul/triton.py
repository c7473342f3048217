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

from llmpress.kernels.bits import aligned, load_codes
from llmpress.kernels.dispatch import num_splits
from llmpress.kernels.tiles import operand_dtype, rows_of_tile

LEAST_INPUTS = 256
"""Input channels that a part of a split sum has at least."""
RUN = 32
"""Codes that are taken together."""


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
    num_groups,
    split_size,
    stride_xm,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # A step takes one code of each run. The code stays where it is in its half of a word: there it
    # becomes the last digits of 2^23, which makes it the float 2^23 + 2^shift · code without a
    # conversion. What is left of 2^shift goes into x, or into the scale.
    BLOCK_RUNS: tl.constexpr = BLOCK_I // 32
    pid_o, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m, mask_o = offs_m < num_rows, offs_o < out_features
    start = pid_s * split_size
    stop = min(start + split_size, in_features)
    words_ptr = codes_ptr.to(tl.pointer_type(tl.uint32))
    row_acc = tl.zeros([BLOCK_O, BLOCK_RUNS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for first in range(start, stop, BLOCK_I):
        offs_i = first + 32 * tl.arange(0, BLOCK_RUNS)
        mask_i = offs_i < stop
        mask = mask_o[:, None] & mask_i[None, :]
        run = offs_o[:, None] * (in_features // 32) + (offs_i // 32)[None, :]
        own_ptr = words_ptr + run * NUM_BITS
        group = offs_o[:, None] * num_groups + (offs_i // GROUP_SIZE)[None, :]
        scales = tl.load(scales_ptr + group, mask=mask, other=0).to(tl.float32)
        zeros = load_codes(zeros_ptr, group, mask, NUM_BITS).to(tl.float32)
        rows_ptr = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_i[None, :]
        mask_x = mask_m[:, None] & mask_i[None, :]
        total = tl.zeros([BLOCK_O, BLOCK_RUNS], dtype=tl.float32)
        word = tl.load(own_ptr, mask=mask, other=0)
        following = word
        for k in tl.static_range(32):
            if k > 0 and k * NUM_BITS % 32 == 0:
                word = tl.load(own_ptr + k * NUM_BITS // 32, mask=mask, other=0)
            elif k > 0 and k * NUM_BITS % 32 < NUM_BITS:  # the code before this one lay in both
                word = following
            if k * NUM_BITS % 32 + NUM_BITS > 32:
                following = tl.load(own_ptr + k * NUM_BITS // 32 + 1, mask=mask, other=0)
                code = (word >> (k * NUM_BITS % 32)) | (following << (32 - k * NUM_BITS % 32))
                power = 1
            elif k * NUM_BITS % 32 >= 16:
                code = word >> 16
                power = 1 << (k * NUM_BITS % 16)
            else:
                code = word
                power = 1 << (k * NUM_BITS % 16)
            digits = (code & (((1 << NUM_BITS) - 1) * power)) | 0x4B000000
            weight = digits.to(tl.float32, bitcast=True) - (zeros * power + 8388608.0)
            x = tl.load(rows_ptr + k, mask=mask_x, other=0)
            if BLOCK_M == 1:
                total += weight * (x.to(tl.float32) * (1.0 / power))
            else:
                weight = (weight * (scales * (1.0 / power))).to(x_ptr.dtype.element_ty).to(OPERAND)
                acc = tl.dot(x.to(OPERAND), tl.trans(weight), acc, input_precision="ieee")
        if BLOCK_M == 1:
            row_acc += total * scales
    if BLOCK_M == 1:
        acc = tl.sum(row_acc, axis=1)[None, :]
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
    num_groups,
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
    out_features, num_groups = scales.shape
    block_m = rows_of_tile(num_rows, x.dtype)
    in_runs = in_features % RUN == 0 and group_size % RUN == 0
    if in_runs:
        kernel, block_o, block_i = _quantized_runs_kernel, 64, RUN * (8 if block_m == 1 else 16)
    else:
        kernel, block_o, block_i = _quantized_matmul_kernel, 32, 64
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
        num_groups,
        split_size,
        x.stride(0),
        GROUP_SIZE=group_size,
        NUM_BITS=num_bits,
        OPERAND=operand_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
    )
    return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
