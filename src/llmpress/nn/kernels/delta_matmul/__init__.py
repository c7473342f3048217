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
)
from llmpress.nn.kernels.dispatch import uses_compiled, uses_triton

if TYPE_CHECKING:
    from llmpress.nn.kernels.cpu.deltas import DeltaTables


class RowDeltas:
    """Deltas of one layer and which row gets which; made once for many products.

    Args:
        deltas: Groups of each tenant, largest precision first; all of one ``in`` and ``out``.
        tenants: Whose delta each row gets, by its number; -1 for none.
        group_size: Of the quantized vectors.
    """

    def __init__(
        self,
        deltas: Sequence[Sequence[TripletGroup]],
        tenants: Sequence[int],
        group_size: int,
    ) -> None:
        if unknown := {t for t in tenants if not -1 <= t < len(deltas)}:
            raise ValueError(f"tenants: {sorted(unknown)} unknown; there are {len(deltas)} deltas")
        self.deltas = [list(groups) for groups in deltas]
        self.tenants = list(tenants)
        self.group_size = group_size
        self._compiled: DeltaTables | None = None

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Addresses and work items for the kernels, on the CPU."""
        from llmpress.nn.kernels.delta_matmul.triton import work_tables

        return work_tables(self.deltas, self.tenants)

    def compiled_tables(self, shape: tuple[int, int]) -> "DeltaTables":
        """Addresses for the library for CPUs, for deltas ``[out, in]``."""
        if self._compiled is None:
            from llmpress.nn.kernels.cpu.deltas import delta_tables

            self._compiled = delta_tables(self.deltas, self.tenants, shape, self.group_size)
        return self._compiled

    @cached_property
    def has_stored_dtypes(self) -> bool:
        """Whether all scales are in fp16, as they are but while they train."""
        vectors = [v for delta in self.deltas for group in delta for v in (group.right, group.left)]
        return all(v.scales.dtype == torch.float16 for v in vectors)


def delta_matmul(x: Tensor, y: Tensor, rows: RowDeltas) -> Tensor:
    """Add every row's delta to the base's outputs.

    Args:
        x: Inputs of the layer, ``[M, in]``, fp16, bf16 or fp32; rows contiguous.
        y: Outputs of the base's layer, ``[M, out]`` in the dtype of ``x``; not modified.
        rows: Deltas, and whose the ``M`` rows are.

    Returns:
        ``[M, out]`` in the dtype of ``x``; sums are fp32. Without gradients.

    Raises:
        ValueError: Another number of rows.
    """
    if len(x) != len(rows.tenants):
        raise ValueError(f"rows: {len(rows.tenants)} have tenants, the input has {len(x)}")
    if uses_triton(x):
        from llmpress.nn.kernels.delta_matmul.triton import delta_matmul_triton

        return delta_matmul_triton(x, y, rows.tables, rows.group_size)
    if uses_compiled(x) and rows.has_stored_dtypes:
        from llmpress.nn.kernels.cpu.deltas import delta_matmul_compiled

        return delta_matmul_compiled(x, y, rows.compiled_tables((y.shape[1], x.shape[1])))
    tenants = torch.tensor(rows.tenants, device=x.device)
    return delta_matmul_reference(x, y, rows.deltas, tenants, rows.group_size)


__all__ = ["PackedVectors", "RowDeltas", "TripletGroup", "delta_matmul"]
