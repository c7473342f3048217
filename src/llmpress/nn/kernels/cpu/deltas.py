"""Tables of addresses for the products of many deltas, as `products.cpp` reads them."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from llmpress.nn.kernels.cpu import DTYPE_NUMBERS, needed_library
from llmpress.nn.kernels.delta_matmul.reference import PackedVectors, TripletGroup, rows_by_tenant


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


class DeltaTables(NamedTuple):
    """What the library needs of deltas and of whose the rows are; tensors stay where they are.

    Attributes:
        groups: Of all tenants that have rows, one after the other.
        tenants: Theirs.
        rows: The numbers of rows, tenant by tenant.
        sigmas: Held, lest their memory is used again.
    """

    groups: "ctypes.Array[_Triplets]"
    tenants: "ctypes.Array[_Tenant]"
    rows: "ctypes.Array[ctypes.c_int64]"
    sigmas: list[Tensor]


def delta_tables(
    deltas: Sequence[Sequence[TripletGroup]],
    tenants: Sequence[int],
    shape: tuple[int, int],
    group_size: int,
) -> DeltaTables:
    """Return the tables of deltas ``[out, in]`` for rows with these tenants, -1 for none."""
    groups: list[_Triplets] = []
    entries: list[_Tenant] = []
    rows: list[int] = []
    sigmas: list[Tensor] = []
    for tenant, numbers in rows_by_tenant(tenants).items():
        entries.append(_Tenant(len(groups), len(deltas[tenant]), len(rows), len(numbers)))
        rows += numbers
        for group in deltas[tenant]:
            sigmas.append(group.sigma)
            right = _packed(group.right, shape[1], group.num_bits, group_size)
            left = _packed(group.left, shape[0], group.num_bits, group_size)
            groups.append(_Triplets(right, left, group.sigma.data_ptr()))
    return DeltaTables(
        (_Triplets * len(groups))(*groups),
        (_Tenant * len(entries))(*entries),
        (ctypes.c_int64 * len(rows))(*rows),
        sigmas,
    )


def _packed(vectors: PackedVectors, length: int, num_bits: int, group_size: int) -> _Packed:
    tensors = vectors.codes, vectors.scales, vectors.zero_points
    addresses = [tensor.data_ptr() for tensor in tensors]
    return _Packed(*addresses, len(vectors.scales), length, num_bits, group_size, 0.0)


def delta_matmul_compiled(x: Tensor, y: Tensor, tables: DeltaTables) -> Tensor:
    """Return ``y [M, out]`` with every row's delta added, for ``x [M, in]`` of its dtype."""
    out = y.clone()
    needed_library().delta(
        out.data_ptr(), x.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[x.dtype], len(tables.rows),
        tables.groups, tables.tenants, len(tables.tenants), tables.rows,
    )  # fmt: skip
    return out
