"""Each row's own tenant's delta on top of the base's output, as a formula.

``y[m] += Σ_g ((x[m] V̂_gᵀ) ⊙ σ_g) Û_g`` with the groups g of the delta that row m belongs to,
``V̂_g [r_g, in]``, ``Û_g [r_g, out]``: rows of packed integers with a scale and a zero point for
each ``group_size`` consecutive channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from llmpress.nn.kernels.quantized_matmul.reference import quantized_weight


class PackedVectors(NamedTuple):
    """Quantized vectors, one per row.

    Attributes:
        codes: Packed, uint8, of ``[r, n]`` integers.
        scales: fp16 ``[r, ceil(n / group_size)]``.
        zero_points: Packed, uint8, of as many integers.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor


class TripletGroup(NamedTuple):
    """Singular triplets of one precision.

    Attributes:
        num_bits: Of codes and zero points, 1 to 8.
        right: ``V̂``, ``r`` vectors of ``in`` channels.
        left: ``Û``, ``r`` vectors of ``out`` channels.
        sigma: fp32 ``[r]``.
    """

    num_bits: int
    right: PackedVectors
    left: PackedVectors
    sigma: Tensor


def delta_matmul_reference(
    x: Tensor,
    y: Tensor,
    deltas: Sequence[Sequence[TripletGroup]],
    tenants: Tensor,
    group_size: int,
) -> Tensor:
    """Return ``y [M, out]`` with every row's delta added, in the dtype of ``x [M, in]``.

    Args:
        x: Inputs of the layer.
        y: Outputs of the base's layer.
        deltas: Groups of each tenant.
        tenants: Whose delta each row gets, int64 ``[M]``; -1 for none.
        group_size: Of the quantized vectors.
    """
    out = y.float()
    for tenant, groups in enumerate(deltas):
        rows = (tenants == tenant).nonzero()[:, 0]
        for group in groups:
            V = quantized_weight(*_ordered(group.right), group.num_bits, group_size, x.shape[1])
            U = quantized_weight(*_ordered(group.left), group.num_bits, group_size, y.shape[1])
            z = (x[rows].float() @ V.t()) * group.sigma
            out = out.index_add(0, rows, z @ U)
    return out.to(x.dtype)


def _ordered(vectors: PackedVectors) -> tuple[Tensor, Tensor, Tensor]:
    return vectors.codes, vectors.scales, vectors.zero_points


def rows_by_tenant(tenants: Sequence[int]) -> dict[int, list[int]]:
    """Return the numbers of each tenant's rows, in the order of tenants; -1 is left out."""
    found: dict[int, list[int]] = {}
    for row, tenant in enumerate(tenants):
        if tenant >= 0:
            found.setdefault(tenant, []).append(row)
    return dict(sorted(found.items()))
