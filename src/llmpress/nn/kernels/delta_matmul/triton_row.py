"""The two launches of `delta_matmul` for one row of each tenant, without tensor cores.

For vectors and scale groups of whole runs (`..runs`). Right vectors are packed along
what is summed and are multiplied like a quantized weight. Left vectors are packed along the
outputs: the K-th codes of a tile's runs belong to outputs 32 apart, and each K has its own sums.

Widths are known at run time only: a program has a branch for each.
"""

import triton
import triton.language as tl

from llmpress.nn.kernels.bits import load_codes
from llmpress.nn.kernels.runs import next_code, place_of, product_with_runs


@triton.jit
def row_right_kernel(
    x_ptr,
    order_ptr,
    items_ptr,
    groups_ptr,
    sigma_ptr,
    z_ptr,
    in_features,
    most_triplets,
    stride_xm,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Make ``z = σ ⊙ (x V̂ᵀ)`` for a row and ``BLOCK_R`` triplets of one precision."""
    item_ptr = items_ptr + tl.program_id(0) * 4
    place = tl.load(item_ptr)
    group_ptr = groups_ptr + tl.load(item_ptr + 2) * COLUMNS
    num_bits = tl.load(group_ptr)
    offs_r = (tl.load(item_ptr + 3) + tl.arange(0, BLOCK_R)).to(tl.int32)
    mask_r = offs_r < tl.load(group_ptr + 1)
    row_ptr = x_ptr + tl.load(order_ptr + place) * stride_xm
    z = tl.zeros([1, BLOCK_R], dtype=tl.float32)
    for width in tl.static_range(1, 9):
        if num_bits == width:
            z = product_with_runs(
                row_ptr + tl.arange(0, 1),
                tl.arange(0, 1) == 0,
                tl.load(group_ptr + 4).to(tl.pointer_type(tl.uint8)),
                tl.load(group_ptr + 6).to(tl.pointer_type(tl.float16)),
                tl.load(group_ptr + 5).to(tl.pointer_type(tl.uint8)),
                offs_r,
                mask_r,
                in_features,
                0,
                in_features,
                GROUP_SIZE,
                width,
                None,
                1,
                BLOCK_I,
                BLOCK_R,
            )
    of_all = tl.load(group_ptr + 2) + offs_r
    sigma = tl.load(sigma_ptr + of_all, mask=mask_r, other=0)
    of_tenant = tl.load(group_ptr + 3) + offs_r
    z_row_ptr = z_ptr + place * most_triplets
    tl.store(z_row_ptr + of_tenant, tl.sum(z, axis=0) * sigma, mask=mask_r)


@triton.jit
def row_left_kernel(
    y_ptr,
    order_ptr,
    items_ptr,
    groups_ptr,
    z_ptr,
    out_ptr,
    out_features,
    most_triplets,
    stride_ym,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Make ``y + z Û`` for a row and ``BLOCK_O`` outputs."""
    BLOCK_RUNS: tl.constexpr = BLOCK_O // 32
    item_ptr = items_ptr + tl.program_id(0) * 4
    place = tl.load(item_ptr)
    offs_run = tl.program_id(1) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    mask_run = offs_run * 32 < out_features
    sums = ()  # by place in a run; over triplets they are added at the end
    for _ in tl.static_range(32):
        sums += (tl.zeros([BLOCK_R, BLOCK_RUNS], dtype=tl.float32),)
    for group in range(tl.load(item_ptr + 2), tl.load(item_ptr + 3)):
        group_ptr = groups_ptr + group * COLUMNS
        num_bits = tl.load(group_ptr)
        for width in tl.static_range(1, 9):
            if num_bits == width:
                sums = _with_left_vectors(
                    sums,
                    z_ptr + place * most_triplets + tl.load(group_ptr + 3),
                    tl.load(group_ptr + 1).to(tl.int32),
                    tl.load(group_ptr + 7).to(tl.pointer_type(tl.uint32)),
                    tl.load(group_ptr + 9).to(tl.pointer_type(tl.float16)),
                    tl.load(group_ptr + 8).to(tl.pointer_type(tl.uint8)),
                    offs_run,
                    mask_run,
                    out_features,
                    GROUP_SIZE,
                    width,
                    BLOCK_R,
                    BLOCK_RUNS,
                )
    row = tl.load(order_ptr + place)
    for k in tl.static_range(32):
        offs_o = offs_run * 32 + k
        y = tl.load(y_ptr + row * stride_ym + offs_o, mask=mask_run, other=0)
        total = y.to(tl.float32) + tl.sum(sums[k], axis=0)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_features + offs_o, out, mask=mask_run)


@triton.jit
def _with_left_vectors(
    sums,
    z_ptr,
    rank,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    offs_run,
    mask_run,
    out_features,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """Return the 32 sums with ``z[r] · Û[r, 32 · run + k]`` added to the k-th."""
    num_scales = (out_features + GROUP_SIZE - 1) // GROUP_SIZE
    for first in range(0, rank, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rank
        mask = mask_r[:, None] & mask_run[None, :]
        run_ptr = words_ptr + (offs_r[:, None] * (out_features // 32) + offs_run) * NUM_BITS
        group = offs_r[:, None] * num_scales + (offs_run * 32 // GROUP_SIZE)[None, :]
        scales = tl.load(scales_ptr + group, mask=mask, other=0).to(tl.float32)
        zeros = load_codes(zeros_ptr, group, mask, NUM_BITS).to(tl.float32)
        factors = tl.load(z_ptr + offs_r, mask=mask_r, other=0)[:, None] * scales
        word = tl.zeros([BLOCK_R, BLOCK_RUNS], dtype=tl.uint32)
        following = word
        added = ()
        for k in tl.static_range(32):
            word, following, left = next_code(
                run_ptr, mask, zeros, word, following, k, NUM_BITS, True
            )
            added += (sums[k] + left * (factors * (1.0 / place_of(k, NUM_BITS, True))),)
        sums = added
    return sums
