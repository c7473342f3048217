"""Many tenants' mixed-precision low-rank deltas in one batch, each row with its own."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmpress.nn.kernels.delta_matmul.reference import (
    PackedVectors,
    TripletGroup,
    delta_matmul_reference,
    rows_by_tenant,
)
from llmpress.nn.kernels.dispatch import uses_compiled, uses_triton

if TYPE_CHECKING:
    from llmpress.nn.kernels.cpu.deltas import GroupTable, RowTable, Spans
    from llmpress.nn.kernels.delta_matmul.triton import Groups, Items, Ranks


class PackedDeltas:
    """Deltas of one layer, one for each tenant: made once, whoever's the rows are.

    Args:
        deltas: Groups of each tenant, largest precision first; all of one ``in`` and ``out``.
        group_size: Of the quantized vectors.
    """

    def __init__(self, deltas: Sequence[Sequence[TripletGroup]], group_size: int) -> None:
        self.deltas = [list(groups) for groups in deltas]
        self.group_size = group_size
        self._compiled: GroupTable | None = None

    @cached_property
    def groups(self) -> "Groups":
        """Addresses for Triton's kernels, on the device of the deltas."""
        from llmpress.nn.kernels.delta_matmul.triton import group_tensors

        return group_tensors(self.deltas)

    def compiled(self, shape: tuple[int, int]) -> "GroupTable":
        """Addresses for the library for CPUs, for deltas ``[out, in]``."""
        if self._compiled is None:
            from llmpress.nn.kernels.cpu.deltas import group_table

            self._compiled = group_table(self.deltas, shape, self.group_size)
        return self._compiled

    @cached_property
    def has_stored_dtypes(self) -> bool:
        """Whether all scales are in fp16, as they are but while they train."""
        vectors = [v for delta in self.deltas for group in delta for v in (group.right, group.left)]
        return all(v.scales.dtype == torch.float16 for v in vectors)


class RowOwners:
    """Whose the rows of a batch are, for all layers.

    Args:
        tenants: Whose delta each row gets, by its number; -1 for none.
    """

    def __init__(self, tenants: Sequence[int]) -> None:
        self.tenants = list(tenants)
        self.by_tenant = rows_by_tenant(tenants)
        self._compiled: dict[Spans, RowTable] = {}
        self._items: dict[tuple[Ranks, torch.device], Items] = {}

    def compiled(self, spans: "Spans") -> "RowTable":
        """Return the table of rows for the library for CPUs."""
        if spans not in self._compiled:
            from llmpress.nn.kernels.cpu.deltas import row_table

            self._compiled[spans] = row_table(self.by_tenant, spans)
        return self._compiled[spans]

    def items(self, ranks: "Ranks", device: torch.device) -> "Items":
        """Return the work items for Triton's kernels, on the device."""
        if (ranks, device) not in self._items:
            from llmpress.nn.kernels.delta_matmul.triton import work_items

            self._items[ranks, device] = work_items(self.by_tenant, ranks, device)
        return self._items[ranks, device]


def delta_matmul(x: Tensor, y: Tensor, deltas: PackedDeltas, owners: RowOwners) -> Tensor:
    """Add every row's delta to the base's outputs.

    Args:
        x: Inputs of the layer, ``[M, in]``, fp16, bf16 or fp32; rows contiguous.
        y: Outputs of the base's layer, ``[M, out]`` in the dtype of ``x``; not modified.
        deltas: Of every tenant.
        owners: Whose the ``M`` rows are.

    Returns:
        ``[M, out]`` in the dtype of ``x``; sums are fp32. Without gradients.

    Raises:
        ValueError: Another number of rows, or a tenant without a delta.
    """
    if len(x) != len(owners.tenants):
        raise ValueError(f"rows: {len(owners.tenants)} have tenants, the input has {len(x)}")
    if max(owners.by_tenant, default=-1) >= len(deltas.deltas):
        unknown = sorted(t for t in owners.by_tenant if t >= len(deltas.deltas))
        raise ValueError(f"tenants: {unknown} unknown; there are {len(deltas.deltas)} deltas")
    if uses_triton(x):
        from llmpress.nn.kernels.delta_matmul.triton import delta_matmul_triton

        groups = deltas.groups
        items = owners.items(groups.ranks, x.device)
        return delta_matmul_triton(x, y, groups, items, deltas.group_size)
    if uses_compiled(x) and deltas.has_stored_dtypes:
        from llmpress.nn.kernels.cpu.deltas import delta_matmul_compiled

        table = deltas.compiled((y.shape[1], x.shape[1]))
        return delta_matmul_compiled(x, y, table, owners.compiled(table.spans))
    tenants = torch.tensor(owners.tenants, device=x.device)
    return delta_matmul_reference(x, y, deltas.deltas, tenants, deltas.group_size)


__all__ = ["PackedDeltas", "PackedVectors", "RowOwners", "TripletGroup", "delta_matmul"]
