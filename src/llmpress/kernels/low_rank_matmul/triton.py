"""``y = (x Bᵀ) Aᵀ`` in one launch.

A program takes ``BLOCK_R`` of the ranks: it makes their part of ``z = x Bᵀ`` in registers and
multiplies it by their columns of ``A`` at once, so that both factors are read once and ``z`` never
leaves the processor. The parts of ``y`` are added up in fp32, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.kernels.tiles import operand_dtype, rows_of_tile


@triton.jit
def _low_rank_matmul_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    num_rows,
    in_features,
    out_features,
    rank,
    stride_xm,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    pid_r = tl.program_id(0)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < num_rows, offs_r < rank
    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first in range(0, in_features, BLOCK_I):
        offs_i = first + tl.arange(0, BLOCK_I)
        mask_i = offs_i < in_features
        x = tl.load(
            x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_i[None, :],
            mask=mask_m[:, None] & mask_i[None, :],
            other=0,
        )
        b = tl.load(
            b_ptr + offs_r[:, None].to(tl.int64) * in_features + offs_i[None, :],
            mask=mask_r[:, None] & mask_i[None, :],
            other=0,
        )
        b = b.to(x_ptr.dtype.element_ty).to(OPERAND)
        z = tl.dot(x.to(OPERAND), tl.trans(b), z, input_precision="ieee")
    z = z.to(x_ptr.dtype.element_ty).to(OPERAND)
    for first in range(0, out_features, BLOCK_O):
        offs_o = first + tl.arange(0, BLOCK_O)
        mask_o = offs_o < out_features
        a = tl.load(
            a_ptr + offs_o[:, None].to(tl.int64) * rank + offs_r[None, :],
            mask=mask_o[:, None] & mask_r[None, :],
            other=0,
        )
        a = a.to(x_ptr.dtype.element_ty).to(OPERAND)
        y = tl.dot(z, tl.trans(a), input_precision="ieee")
        row_start = (pid_r * num_rows + offs_m).to(tl.int64) * out_features
        tl.store(
            out_ptr + row_start[:, None] + offs_o[None, :],
            y,
            mask=mask_m[:, None] & mask_o[None, :],
        )


def low_rank_matmul_triton(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``(x Bᵀ) Aᵀ``, ``[M, out]`` in the dtype of ``x [M, in]``, for few rows.

    ``z`` is rounded to the dtype of ``x``, as between two layers.
    """
    num_rows, in_features = x.shape
    out_features, rank = A.shape
    block_m, block_r = max(16, rows_of_tile(num_rows, x.dtype)), 16
    block = 32 if x.dtype == torch.float32 else 128
    rows, parts = triton.cdiv(num_rows, block_m), triton.cdiv(rank, block_r)
    out = x.new_empty(parts, num_rows, out_features, dtype=torch.float32)
    _low_rank_matmul_kernel[(parts, rows)](
        x,
        A,
        B,
        out,
        num_rows,
        in_features,
        out_features,
        rank,
        x.stride(0),
        OPERAND=operand_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_I=block,
        BLOCK_O=block,
    )
    return out.sum(dim=0).to(x.dtype)
