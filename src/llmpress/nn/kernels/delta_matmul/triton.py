"""Deltas of many tenants in two launches, their packed vectors unpacked in registers.

Rows are taken in the order of their tenants, in pieces of one tenant: of one row where no tenant
has more than `MOST_SINGLE_ROWS`, else of `BLOCK_M` rows. The first kernel makes
``z = σ ⊙ (x V̂ᵀ)`` for a piece and ``BLOCK_R`` triplets of one precision, the second one ``y + z Û``
for a piece and ``BLOCK_O`` outputs. Tensors are found by their addresses, so that no delta has to
be copied when rows or tenants change.

The kernels here take pieces of any size and vectors of any length; those of `triton_row` are for
single rows, and take a quarter of the instructions per packed number.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.bits import load_codes_of_width
from llmpress.nn.kernels.delta_matmul.reference import TripletGroup
from llmpress.nn.kernels.delta_matmul.triton_row import row_left_kernel, row_right_kernel
from llmpress.nn.kernels.dispatch import on_its_device
from llmpress.nn.kernels.runs import RUN
from llmpress.nn.kernels.tiles import operand_dtype

MOST_SINGLE_ROWS = 3
"""Of a tenant that are multiplied one by one: four take as many instructions as a tile."""
BLOCK_M = 16
BLOCK_R = 16
COLUMNS = 10
"""Of the table of groups: bits, rank, first triplet among all and among the tenant's, then the
addresses of the right vectors' codes, zero points and scales, and of the left ones'."""


@triton.jit
def _vectors(
    group_ptr,
    side,
    offs_r,
    mask_r,
    first,
    length,
    IN_WORDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Unpack ``scale · (code - zero_point)``, fp32 ``[BLOCK_R, BLOCK_N]``; zero outside."""
    num_bits = tl.load(group_ptr).to(tl.int32)
    at = group_ptr + 4 + 3 * side
    codes_ptr = tl.load(at).to(tl.pointer_type(tl.uint8))
    zeros_ptr = tl.load(at + 1).to(tl.pointer_type(tl.uint8))
    scales_ptr = tl.load(at + 2).to(tl.pointer_type(tl.float16))
    offs_n = tl.arange(0, BLOCK_N)
    mask = mask_r[:, None] & (first + offs_n < length)[None, :]
    num_scales = (length + GROUP_SIZE - 1) // GROUP_SIZE
    if GROUP_SIZE % BLOCK_N == 0:  # one group for all of a vector's channels
        place = offs_r[:, None] * num_scales + first // GROUP_SIZE
        scales = tl.load(scales_ptr + place, mask=mask_r[:, None], other=0).to(tl.float32)
        zeros = load_codes_of_width(zeros_ptr, place, mask_r[:, None], num_bits)
    else:
        place = offs_r[:, None] * num_scales + ((first + offs_n) // GROUP_SIZE)[None, :]
        scales = tl.load(scales_ptr + place, mask=mask, other=0).to(tl.float32)
        zeros = load_codes_of_width(zeros_ptr, place, mask, num_bits)
    if IN_WORDS:
        row = (offs_r * (length // 32) + first // 32) * num_bits
        bit = offs_n * num_bits
        word_ptr = codes_ptr.to(tl.pointer_type(tl.uint32)) + row[:, None] + (bit >> 5)[None, :]
        shift = (bit & 31)[None, :]
        low = tl.load(word_ptr, mask=mask, other=0)
        high = tl.load(word_ptr + 1, mask=mask & (shift + num_bits > 32), other=0)
        codes = (low >> shift) | ((high << 1) << (31 - shift))
        codes &= (1 << num_bits) - 1
    else:
        index = offs_r[:, None].to(tl.int64) * length + (first + offs_n)[None, :]
        codes = load_codes_of_width(codes_ptr, index, mask, num_bits).to(tl.uint32)
    # As the last digits of 2^23 an integer is a float without a conversion.
    digits = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    return (digits - (zeros.to(tl.float32) + 8388608.0)) * scales


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
    IN_WORDS: tl.constexpr,
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
    for first in tl.range(0, in_features, BLOCK_I, num_stages=1):
        offs_i = first + tl.arange(0, BLOCK_I)
        mask_i = offs_i < in_features
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + offs_i[None, :],
            mask=mask_m[:, None] & mask_i[None, :],
            other=0,
        )
        right = _vectors(
            group_ptr, 0, offs_r, mask_r, first, in_features, IN_WORDS, GROUP_SIZE, BLOCK_I
        )
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
    IN_WORDS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    item_ptr = items_ptr + tl.program_id(0) * 4
    first_row, num_rows = tl.load(item_ptr), tl.load(item_ptr + 1)
    first_group, last_group = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    first_o = tl.program_id(1) * BLOCK_O
    offs_o = first_o + tl.arange(0, BLOCK_O)
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
        for first in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = (first + tl.arange(0, BLOCK_R)).to(tl.int32)
            mask_r = offs_r < rank
            own = tl.load(group_ptr + 3) + offs_r
            z = tl.load(
                z_ptr + offs_m[:, None] * most_triplets + own[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0,
            ).to(y_ptr.dtype.element_ty)
            left = _vectors(
                group_ptr, 1, offs_r, mask_r, first_o, out_features, IN_WORDS, GROUP_SIZE, BLOCK_O
            )
            left = left.to(y_ptr.dtype.element_ty).to(OPERAND)
            acc = tl.dot(z.to(OPERAND), left, acc, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * out_features + offs_o[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


Ranks = tuple[tuple[int, ...], ...]
"""Triplets of each group, tenant by tenant."""


class Groups(NamedTuple):
    """What the kernels look up of a layer's deltas, on their device.

    Attributes:
        table: int64 ``[all groups, COLUMNS]``.
        sigma: fp32 ``[all triplets]``.
        ranks: Of each tenant's groups.
        most: Triplets of the largest delta.
        aligned: Whether all codes can be read word by word.
    """

    table: Tensor
    sigma: Tensor
    ranks: Ranks
    most: int
    aligned: bool


class Items(NamedTuple):
    """Whose the rows are, in pieces, for every layer with deltas of these ranks.

    Attributes:
        order: int64: rows by tenant.
        right: int64 ``[items, 4]``: place of the first row in ``order``, rows, group, first
            triplet.
        left: int64 ``[items, 4]``: the same rows, first and last group of the tenant.
        rows_of_piece: At most.
    """

    order: Tensor
    right: Tensor
    left: Tensor
    rows_of_piece: int


def group_tensors(deltas: Sequence[Sequence[TripletGroup]]) -> Groups:
    """Return the table of all tenants' groups."""
    table: list[list[int]] = []
    total = 0
    for delta in deltas:
        own = 0
        for group in delta:
            rank = len(group.sigma)
            addresses = [
                tensor.data_ptr()
                for side in (group.right, group.left)
                for tensor in (side.codes, side.zero_points, side.scales)
            ]
            table.append([group.num_bits, rank, total + own, own, *addresses])
            own += rank
        total += own
    sigma = [group.sigma for delta in deltas for group in delta]
    device = sigma[0].device if sigma else None
    ranks = tuple(tuple(len(group.sigma) for group in delta) for delta in deltas)
    return Groups(
        torch.tensor(table, dtype=torch.int64, device=device).view(-1, COLUMNS),
        torch.cat(sigma) if sigma else torch.zeros(0),
        ranks,
        max(map(sum, ranks), default=0),
        all(row[place] % 4 == 0 for row in table for place in (4, 7)),
    )


def work_items(by_tenant: Mapping[int, Sequence[int]], ranks: Ranks, device: torch.device) -> Items:
    """Return the pieces of each tenant's rows, on a device."""
    ends = list(accumulate(map(len, ranks)))
    most_rows = max(map(len, by_tenant.values()), default=0)
    rows_of_piece = 1 if most_rows <= MOST_SINGLE_ROWS else BLOCK_M
    order: list[int] = []
    right: list[list[int]] = []
    left: list[list[int]] = []
    for tenant, rows in by_tenant.items():
        first = ends[tenant] - len(ranks[tenant])
        for start in range(0, len(rows), rows_of_piece):
            piece = [len(order), len(rows[start : start + rows_of_piece])]
            order += rows[start : start + rows_of_piece]
            left.append([*piece, first, ends[tenant]])
            right += [
                [*piece, first + group, triplet]
                for group, rank in enumerate(ranks[tenant])
                for triplet in range(0, rank, BLOCK_R)
            ]
    return Items(
        torch.tensor(order, dtype=torch.int64, device=device),
        torch.tensor(right, dtype=torch.int64, device=device).view(-1, 4),
        torch.tensor(left, dtype=torch.int64, device=device).view(-1, 4),
        rows_of_piece,
    )


@on_its_device
def delta_matmul_triton(
    x: Tensor, y: Tensor, groups: Groups, items: Items, group_size: int
) -> Tensor:
    """Return ``y [M, out]`` with every row's delta added; ``z`` is fp32."""
    out = y.clone()
    if not len(items.right):
        return out
    in_words = groups.aligned and all(n % RUN == 0 for n in (x.shape[1], y.shape[1], group_size))
    if items.rows_of_piece == 1 and in_words:
        right, of_right = row_right_kernel, {"BLOCK_I": 32 * RUN}
        left, of_left = row_left_kernel, {"BLOCK_R": 2 * BLOCK_R, "BLOCK_O": 4 * RUN}
        of_both = {}
    else:
        right, of_right = _delta_right_kernel, {"BLOCK_I": 32 if x.dtype == torch.float32 else 128}
        left, of_left = _delta_left_kernel, {"BLOCK_R": BLOCK_R, "BLOCK_O": 64}
        of_both = {
            "IN_WORDS": in_words,
            "OPERAND": operand_dtype(x.dtype),
            "BLOCK_M": BLOCK_M,
        }
    of_both |= {"GROUP_SIZE": group_size, "COLUMNS": COLUMNS}
    z = x.new_empty(len(items.order), groups.most, dtype=torch.float32)
    right[(len(items.right),)](
        x,
        items.order,
        items.right,
        groups.table,
        groups.sigma,
        z,
        x.shape[1],
        groups.most,
        x.stride(0),
        BLOCK_R=BLOCK_R,
        **of_right,
        **of_both,
    )
    left[(len(items.left), triton.cdiv(y.shape[1], of_left["BLOCK_O"]))](
        y,
        items.order,
        items.left,
        groups.table,
        z,
        out,
        y.shape[1],
        groups.most,
        y.stride(0),
        **of_left,
        **of_both,
    )
    return out
