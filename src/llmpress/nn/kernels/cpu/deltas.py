"""Tables of addresses for the products of many deltas, as `products.cpp` reads them."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from llmpress.nn.kernels.cpu import DTYPE_NUMBERS, needed_library
from llmpress.nn.kernels.delta_matmul.reference import PackedVectors, TripletGroup


class _Packed(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("num_bits", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("sign", ctypes.c_float),
    )


class _Triplets(ctypes.Structure):
    _fields_ = (("right", _Packed), ("left", _Packed), ("sigma", ctypes.c_void_p))


class _Tenant(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("first_group", "num_groups", "first_row", "num_rows")
    )


Spans = tuple[tuple[int, int], ...]
"""Of each tenant's groups among those of all: the first, and how many."""


class GroupTable(NamedTuple):
    """What the library needs of a layer's deltas; tensors stay where they are.

    Attributes:
        groups: Of all tenants, one after the other.
        spans: Where each tenant's are.
        sigmas: Held, lest their memory is used again.
    """

    groups: "ctypes.Array[_Triplets]"
    spans: Spans
    sigmas: list[Tensor]


class RowTable(NamedTuple):
    """Whose the rows are, for every layer whose tenants have as many groups.

    Attributes:
        tenants: Those that have rows.
        rows: The numbers of rows, tenant by tenant.
    """

    tenants: "ctypes.Array[_Tenant]"
    rows: "ctypes.Array[ctypes.c_int64]"


def group_table(
    deltas: Sequence[Sequence[TripletGroup]], shape: tuple[int, int], group_size: int
) -> GroupTable:
    """Return the addresses of deltas ``[out, in]``, one for each tenant."""
    groups: list[_Triplets] = []
    spans: list[tuple[int, int]] = []
    for delta in deltas:
        spans.append((len(groups), len(delta)))
        for group in delta:
            right = _packed(group.right, shape[1], group.num_bits, group_size)
            left = _packed(group.left, shape[0], group.num_bits, group_size)
            groups.append(_Triplets(right, left, group.sigma.data_ptr()))
    sigmas = [group.sigma for delta in deltas for group in delta]
    return GroupTable((_Triplets * len(groups))(*groups), tuple(spans), sigmas)


def row_table(by_tenant: Mapping[int, Sequence[int]], spans: Spans) -> RowTable:
    """Return the table of each tenant's rows."""
    entries: list[_Tenant] = []
    rows: list[int] = []
    for tenant, numbers in by_tenant.items():
        entries.append(_Tenant(*spans[tenant], len(rows), len(numbers)))
        rows += numbers
    return RowTable((_Tenant * len(entries))(*entries), (ctypes.c_int64 * len(rows))(*rows))


def _packed(vectors: PackedVectors, length: int, num_bits: int, group_size: int) -> _Packed:
    tensors = vectors.codes, vectors.scales, vectors.zero_points
    addresses = [tensor.data_ptr() for tensor in tensors]
    return _Packed(*addresses, len(vectors.scales), length, num_bits, group_size, 0.0)


def delta_matmul_compiled(x: Tensor, y: Tensor, groups: GroupTable, rows: RowTable) -> Tensor:
    """Return ``y [M, out]`` with every row's delta added, for ``x [M, in]`` of its dtype."""
    out = y.clone()
    needed_library().delta(
        out.data_ptr(), x.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[x.dtype], len(rows.rows),
        groups.groups, rows.tenants, len(rows.tenants), rows.rows,
    )  # fmt: skip
    return out
