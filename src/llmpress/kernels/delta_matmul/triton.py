"""Deltas of many tenants in two launches, their packed vectors unpacked in registers.

Rows are taken in the order of their tenants, in pieces of at most `BLOCK_M` rows of one tenant. The
first kernel makes ``z = σ ⊙ (x V̂ᵀ)`` for a piece and ``BLOCK_R`` triplets of one precision, the
second one ``y + z Û`` for a piece and ``BLOCK_O`` outputs. Tensors are found by their addresses, so
that no delta has to be copied when rows or tenants change.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.kernels.bits import load_codes_of_width
from llmpress.kernels.delta_matmul.reference import TripletGroup, rows_by_tenant
from llmpress.kernels.tiles import operand_dtype

BLOCK_M = 16
BLOCK_R = 16
COLUMNS = 10
"""Of the table of groups: bits, rank, first triplet among all and among the tenant's, then the
addresses of the right vectors' codes, zero points and scales, and of the left ones'."""


@triton.jit
def _vectors(group_ptr, side, offs_r, offs_n, mask_r, mask_n, length, GROUP_SIZE: tl.constexpr):
    """Unpack ``scale · (code - zero_point)``, fp32 ``[BLOCK_R, BLOCK_N]``; zero outside."""
    num_bits = tl.load(group_ptr).to(tl.int32)
    at = group_ptr + 4 + 3 * side
    codes_ptr = tl.load(at).to(tl.pointer_type(tl.uint8))
    zeros_ptr = tl.load(at + 1).to(tl.pointer_type(tl.uint8))
    scales_ptr = tl.load(at + 2).to(tl.pointer_type(tl.float16))
    mask = mask_r[:, None] & mask_n[None, :]
    row = offs_r[:, None].to(tl.int64)
    num_scales = (length + GROUP_SIZE - 1) // GROUP_SIZE
    place = row * num_scales + offs_n[None, :] // GROUP_SIZE
    codes = load_codes_of_width(codes_ptr, row * length + offs_n[None, :], mask, num_bits)
    zeros = load_codes_of_width(zeros_ptr, place, mask, num_bits)
    scales = tl.load(scales_ptr + place, mask=mask, other=0).to(tl.float32)
    return (codes - zeros).to(tl.float32) * scales


@triton.jit
def _delta_right_kernel(
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
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    item_ptr = items_ptr + tl.program_id(0) * 4
    first_row, num_rows = tl.load(item_ptr), tl.load(item_ptr + 1)
    group_ptr = groups_ptr + tl.load(item_ptr + 2) * COLUMNS
    offs_r = (tl.load(item_ptr + 3) + tl.arange(0, BLOCK_R)).to(tl.int32)
    mask_r = offs_r < tl.load(group_ptr + 1)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = tl.arange(0, BLOCK_M) < num_rows
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for first in range(0, in_features, BLOCK_I):
        offs_i = first + tl.arange(0, BLOCK_I)
        mask_i = offs_i < in_features
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + offs_i[None, :],
            mask=mask_m[:, None] & mask_i[None, :],
            other=0,
        )
        right = _vectors(group_ptr, 0, offs_r, offs_i, mask_r, mask_i, in_features, GROUP_SIZE)
        right = right.to(x_ptr.dtype.element_ty).to(OPERAND)
        z = tl.dot(x.to(OPERAND), tl.trans(right), z, input_precision="ieee")
    place = tl.load(group_ptr + 2) + offs_r  # among all triplets of all groups
    sigma = tl.load(sigma_ptr + place, mask=mask_r, other=0)
    own = tl.load(group_ptr + 3) + offs_r  # among those of the tenant
    tl.store(
        z_ptr + offs_m[:, None] * most_triplets + own[None, :],
        z * sigma[None, :],
        mask=mask_m[:, None] & mask_r[None, :],
    )


@triton.jit
def _delta_left_kernel(
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
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    item_ptr = items_ptr + tl.program_id(0) * 4
    first_row, num_rows = tl.load(item_ptr), tl.load(item_ptr + 1)
    first_group, last_group = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < out_features
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = tl.arange(0, BLOCK_M) < num_rows
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    mask = mask_m[:, None] & mask_o[None, :]
    acc = tl.load(y_ptr + rows[:, None] * stride_ym + offs_o[None, :], mask=mask, other=0)
    acc = acc.to(tl.float32)
    for group in range(first_group, last_group):
        group_ptr = groups_ptr + group * COLUMNS
        rank = tl.load(group_ptr + 1)
        for first in range(0, rank, BLOCK_R):
            offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int32)
            mask_r = offs_r < rank
            own = tl.load(group_ptr + 3) + offs_r
            z = tl.load(
                z_ptr + offs_m[:, None] * most_triplets + own[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0,
            ).to(y_ptr.dtype.element_ty)
            left = _vectors(group_ptr, 1, offs_r, offs_o, mask_r, mask_o, out_features, GROUP_SIZE)
            left = left.to(y_ptr.dtype.element_ty).to(OPERAND)
            acc = tl.dot(z.to(OPERAND), left, acc, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * out_features + offs_o[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def work_tables(
    deltas: Sequence[Sequence[TripletGroup]], tenants: Sequence[int]
) -> dict[str, Tensor]:
    """Return what the kernels look up, on the device of the deltas.

    Returns:
        ``groups`` int64 ``[all groups, COLUMNS]``, ``sigma`` fp32 ``[all triplets]``, ``order``
        int64: rows by tenant; ``right`` int64 ``[items, 4]``: place of the first row in ``order``,
        rows, group, first triplet; ``left`` int64 ``[items, 4]``: the same rows, first and last
        group of the tenant; ``most`` int64 ``[1]``, on the CPU: triplets of the largest delta.
    """
    groups: list[list[int]] = []
    of_tenant: list[tuple[int, int]] = []
    sigma: list[Tensor] = []
    total = most = 0
    for delta in deltas:
        first, own = len(groups), 0
        for group in delta:
            rank = len(group.sigma)
            addresses = [
                tensor.data_ptr()
                for side in (group.right, group.left)
                for tensor in (side.codes, side.zero_points, side.scales)
            ]
            groups.append([group.num_bits, rank, total + own, own, *addresses])
            sigma.append(group.sigma)
            own += rank
        of_tenant.append((first, len(groups)))
        total, most = total + own, max(most, own)
    order: list[int] = []
    right: list[list[int]] = []
    left: list[list[int]] = []
    for tenant, rows in rows_by_tenant(tenants).items():
        for start in range(0, len(rows), BLOCK_M):
            piece = [len(order), len(rows[start : start + BLOCK_M])]
            order += rows[start : start + BLOCK_M]
            left.append([*piece, *of_tenant[tenant]])
            right += [
                [*piece, group, triplet]
                for group in range(*of_tenant[tenant])
                for triplet in range(0, groups[group][1], BLOCK_R)
            ]
    device = sigma[0].device if sigma else None
    return {
        "sigma": torch.cat(sigma) if sigma else torch.zeros(0),
        "most": torch.tensor([most]),
        "groups": torch.tensor(groups, device=device).view(-1, COLUMNS),
        "order": torch.tensor(order, dtype=torch.int64, device=device),
        "right": torch.tensor(right, dtype=torch.int64, device=device).view(-1, 4),
        "left": torch.tensor(left, dtype=torch.int64, device=device).view(-1, 4),
    }


def delta_matmul_triton(x: Tensor, y: Tensor, tables: dict[str, Tensor], group_size: int) -> Tensor:
    """Return ``y [M, out]`` with every row's delta added; ``z`` gets the dtype of ``x``."""
    out = y.clone()
    if not len(tables["right"]):
        return out
    most = int(tables["most"])
    z = x.new_empty(len(tables["order"]), most, dtype=torch.float32)
    shared = {"GROUP_SIZE": group_size, "COLUMNS": COLUMNS, "OPERAND": operand_dtype(x.dtype)}
    _delta_right_kernel[(len(tables["right"]),)](
        x,
        tables["order"],
        tables["right"],
        tables["groups"],
        tables["sigma"],
        z,
        x.shape[1],
        most,
        x.stride(0),
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_I=32 if x.dtype == torch.float32 else 128,
        **shared,
    )
    block_o = 64
    _delta_left_kernel[(len(tables["left"]), triton.cdiv(y.shape[1], block_o))](
        y,
        tables["order"],
        tables["left"],
        tables["groups"],
        z,
        out,
        y.shape[1],
        most,
        y.stride(0),
        BLOCK_M=BLOCK_M,
        BLOCK_R=BLOCK_R,
        BLOCK_O=block_o,
        **shared,
    )
    return out
