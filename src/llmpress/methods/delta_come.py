"""Delta-CoMe: singular triplets of a delta in groups of falling precision, under a true bit budget.

Dimensions: ``Δ [out, in]`` the delta, ``H = E[x xᵀ] [in, in]``, ``Δ ≈ Σ_i u_i σ_i v_iᵀ`` with
``u_i [out]``, ``v_i [in]``; a group holds ``r`` triplets as rows ``U [r, out]`` and ``V [r, in]``.
docs/methods/delta_come.md derives each step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmpress.error_feedback import feed_errors_back
from llmpress.layers import MixedLowRankLinear
from llmpress.layers.mixed_low_rank import (
    SCALE_BITS,
    UNQUANTIZED,
    Vectors,
    dequantize_vectors,
    group_bits,
)
from llmpress.linalg import damped_inverse_cholesky
from llmpress.methods.base import InputStatistics, Method, Shape, checked_statistics, checked_weight
from llmpress.uniform import SMALLEST_SCALE, Grid, fit_grid

GAUSSIAN_DISTORTION = (1, 0.648, 0.136, 0.0349, 0.00913, 0.00229, 0.000575, 0.000142, 0.0000352)
"""Mean squared rounding error of standard normal numbers at 0 to 8 bits, 128 to a searched grid."""

PAPER_WIDTH = 4096
"""Matrix width that ``ranks`` are meant for; narrower matrices take proportionally fewer."""

NOISE_FLOOR = 1e-12
"""Squared singular values below this fraction of the largest are rounding errors of fp64."""

SYSTEM_DAMPENING = 1e-4
"""Added to what is factorized, as a fraction of its mean diagonal entry."""

LARGEST_SIGMA = 65504.0
"""The largest fp16 number."""


class Group(NamedTuple):
    """Singular triplets that share a precision."""

    rank: int
    num_bits: int


@dataclass(frozen=True)
class DeltaCoMe(Method):
    """Mixed-precision low rank; the defaults go beyond the paper, see docs/methods/delta_come.md.

    Attributes:
        bits: Budget in bits per weight of the matrix, everything stored included.
        precisions: Bits of the groups of triplets, falling; 1 to 8, or 16 for fp16.
        ranks: Number of triplets of every group but the last, for matrices of width 4096 and in
            proportion for narrower ones; the last group takes the rest of the budget. None: every
            triplet gets the precision with the least expected error under the budget.
        group_size: Consecutive channels of a singular vector that share a scale and a zero point.
        search_range: Whether the range of a grid is the one with the least squared error instead of
            the smallest to the largest entry.
        basis: Directions in which the delta is cut into triplets: ``output`` those of the layer's
            outputs on calibration inputs, ``weight`` those of the delta itself.
        correct_left: Whether the left vectors are solved for anew once the right ones are rounded.
        dampening: Added to the diagonal of ``H``, as a fraction of its mean.
    """

    uses_statistics = True

    bits: float = 1.0
    precisions: tuple[int, ...] = (8, 5, 4, 3, 2)
    ranks: tuple[int, ...] | None = None
    group_size: int = 128
    search_range: bool = True
    basis: Literal["output", "weight"] = "output"
    correct_left: bool = True
    dampening: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(f"bits={self.bits}: must be positive and finite")
        allowed = {*range(1, 9), UNQUANTIZED}
        falling = sorted(set(self.precisions), reverse=True)
        if (
            not self.precisions
            or set(self.precisions) - allowed
            or falling != list(self.precisions)
        ):
            raise ValueError(
                f"precisions={list(self.precisions)}: falling numbers, 1 to 8 or 16, are needed"
            )
        if self.ranks is not None and (
            len(self.ranks) != len(self.precisions) - 1 or min(self.ranks, default=1) < 1
        ):
            raise ValueError(
                f"ranks={list(self.ranks)}: a positive number for each of precisions "
                f"{list(self.precisions[:-1])} is needed; the last group takes the rest"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be positive")
        if self.basis not in ("output", "weight"):
            raise ValueError(f"basis={self.basis!r}: allowed are 'output' and 'weight'")
        if not 0 <= self.dampening < 1:
            raise ValueError(f"dampening={self.dampening}: allowed are 0 to below 1")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> MixedLowRankLinear:
        """Compress a delta ``weight [out, in]``; the seed is not used.

        Without statistics every input counts alike: ``H`` is the identity.

        Raises:
            ValueError: A delta that is no finite float matrix, statistics of another size, or a
                budget too small for a single triplet; names the smallest possible one.

        Source: arXiv 2406.08903, section 4. Deviations in docs/methods/delta_come.md.
        """
        del seed
        delta = checked_weight(weight)
        moment = self._moment(delta, statistics)
        scale = _power_of_two(delta)
        residual = delta / scale
        seen = moment if self.basis == "output" else None
        values, basis = principal_outputs(residual, seen)
        groups = self.plan_groups(values, *delta.shape)
        channels = _Feedback(moment)
        done: list[tuple[Vectors, Vectors, Tensor]] = []
        for rank, num_bits in groups:
            directions, basis = basis[:, :rank], basis[:, rank:]
            V, U, sigma = self._quantize_group(residual, moment, channels, directions, num_bits)
            A = dequantize_vectors(U, self.group_size) * sigma.float()[:, None]  # [r, out]
            residual = residual - A.T @ dequantize_vectors(V, self.group_size)
            done.append((V, U, sigma))
        return MixedLowRankLinear.from_vectors(
            [V for V, _, _ in done],
            [U for _, U, _ in done],
            torch.cat([delta.new_zeros(0), *(sigma for _, _, sigma in done)]),
            scale,
            num_bits=[group.num_bits for group in groups],
            group_size=self.group_size,
            shape=(delta.shape[0], delta.shape[1]),
        )

    def _moment(self, delta: Tensor, statistics: InputStatistics | None) -> Tensor:
        """Return the dampened second moment of the inputs, scaled to a mean diagonal of one."""
        if statistics is None:
            return torch.eye(delta.shape[1], device=delta.device)
        moment = checked_statistics(statistics, delta).second_moment.to(delta.device).float()
        mean = moment.diagonal().mean()
        if not float(mean) > 0:
            return torch.eye(delta.shape[1], device=delta.device)
        moment = moment / mean
        moment.diagonal().add_(max(self.dampening, 1e-6))
        return moment

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the bits of a single triplet at the lowest precision."""
        out_features, in_features = shape
        last = self.precisions[-1]
        bits = group_bits(in_features, out_features, 1, last, self.group_size) + SCALE_BITS
        return bits / (out_features * in_features)

    def plan_groups(self, values: Tensor, out_features: int, in_features: int) -> list[Group]:
        """Spend the budget on groups; none for a delta of zeros."""
        size = out_features * in_features

        def cost(num_bits: int, rank: int) -> int:
            return group_bits(in_features, out_features, rank, num_bits, self.group_size)

        budget = int(self.bits * size) - SCALE_BITS
        if cost(self.precisions[-1], 1) > budget:
            least = (cost(self.precisions[-1], 1) + SCALE_BITS) / size
            raise ValueError(
                f"bits={self.bits}: too small for one triplet at {self.precisions[-1]} bits of "
                f"shape [{out_features}, {in_features}]; the smallest possible budget is "
                f"{math.ceil(1e4 * least) / 1e4:.4f}"
            )
        values = values[values > NOISE_FLOOR * values[0]]
        if self.ranks is None:
            costs = {b: cost(b, 1) for b in self.precisions}
            wanted = expected_best_ranks(values, budget, costs)
        else:
            fraction = min(1.0, min(out_features, in_features) / PAPER_WIDTH)
            wanted = [max(1, round(rank * fraction)) for rank in self.ranks] + [0]
        groups, rank_left = [], len(values)
        for number, (rank, num_bits) in enumerate(zip(wanted, self.precisions, strict=True)):
            last = number == len(wanted) - 1
            most = min(rank_left if last else rank, rank_left)
            group = Group(_most_affordable(partial(cost, num_bits), most, budget), num_bits)
            if group.rank:
                groups.append(group)
                budget -= cost(group.num_bits, group.rank)
                rank_left -= group.rank
        return groups

    def _quantize_group(
        self, delta: Tensor, moment: Tensor, channels: "_Feedback", basis: Tensor, num_bits: int
    ) -> tuple[Vectors, Vectors, Tensor]:
        """Round the triplets of one group.

        Args:
            delta: What is left of the delta, ``[out, in]``.
            moment: Dampened ``H [in, in]``.
            channels: Error feedback with this moment.
            basis: Left vectors of the group, orthonormal, fp64 ``[out, r]``.
            num_bits: The group's precision.

        Returns:
            ``V [r, in]``, ``U [r, out]`` and fp16 ``σ [r]``.
        """
        right = (basis.T @ delta.double()).float()  # [r, in]
        norms = _root_mean_square(right)
        V = self._round_right(right / norms, channels, num_bits)
        stored = dequantize_vectors(V, self.group_size)
        seen = stored @ moment  # [r, in]
        gram = seen @ stored.T  # [r, r]
        left = basis.T.float() * norms  # [r, out]
        if self.correct_left:
            damped = gram.double()
            damped.diagonal().add_(SYSTEM_DAMPENING * damped.diagonal().mean())
            left = torch.linalg.solve(damped, (seen @ delta.T).double()).float()
        sigma = _root_mean_square(left)[:, 0].clamp(SMALLEST_SCALE, LARGEST_SIGMA).to(torch.float16)
        weights = sigma.float()[:, None]  # [r, 1]
        U = self._round_left(left / weights, gram * weights * weights.T, num_bits)
        return V, U, sigma

    def _round_right(self, vectors: Tensor, channels: "_Feedback", num_bits: int) -> Vectors:
        """Round ``V [r, in]``; the error of a channel goes into the channels still to come."""
        if num_bits == UNQUANTIZED:
            return Vectors(vectors.to(torch.float16))
        grid, scales, zeros = self._grid(vectors, num_bits)
        codes = channels.round(vectors.T, scales.T, zeros.T, num_bits).T.contiguous()
        return Vectors(codes, grid.scales, grid.zero_points)

    def _round_left(self, vectors: Tensor, moment: Tensor, num_bits: int) -> Vectors:
        """Round ``U [r, out]``; the error of a triplet goes into the triplets still to come.

        The triplets are the inputs of ``Uᵀ [out, r]`` and ``moment [r, r]`` is theirs, while scales
        run along ``out``, each within one triplet.
        """
        if num_bits == UNQUANTIZED:
            return Vectors(vectors.to(torch.float16))
        grid, scales, zeros = self._grid(vectors, num_bits)
        codes = _Feedback(moment).round(vectors, scales, zeros, num_bits)
        return Vectors(codes, grid.scales, grid.zero_points)

    def _grid(self, vectors: Tensor, num_bits: int) -> tuple[Grid, Tensor, Tensor]:
        """Return the grids of ``vectors [r, n]``, and scale and zero point of each entry."""
        grid = fit_grid(vectors, num_bits, self.group_size, search=self.search_range)
        scales, zeros = (
            part.float().repeat_interleave(self.group_size, dim=1)[:, : vectors.shape[1]]
            for part in grid
        )
        return grid, scales, zeros


class _Feedback:
    """Rounding with error feedback over inputs whose moment is factorized once.

    Args:
        moment: ``[n, n]``, positive semi-definite.
    """

    def __init__(self, moment: Tensor) -> None:
        self.order = moment.diagonal().argsort(descending=True, stable=True)
        ordered = moment[self.order][:, self.order]
        self.factor = damped_inverse_cholesky(ordered, SYSTEM_DAMPENING).factor

    def round(self, inputs: Tensor, scales: Tensor, zeros: Tensor, num_bits: int) -> Tensor:
        """Return the int32 codes of ``inputs [n, rows]``, row by row."""
        columns = [tensor[self.order].contiguous() for tensor in (inputs, scales, zeros)]
        codes = feed_errors_back(columns[0], self.factor, columns[1], columns[2], num_bits)
        return torch.empty_like(codes).index_copy_(0, self.order, codes)


def principal_outputs(delta: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the directions in which the outputs ``Δ x`` vary most.

    They are the eigenvectors of ``Δ H Δᵀ``; with ``H = I`` the left singular vectors of ``Δ``.
    Computed from the smaller of the two Gram matrices in fp64.

    Args:
        delta: ``[out, in]``.
        moment: ``H [in, in]``, positive definite; None stands for the identity.

    Returns:
        Variances ``[min(out, in)]``, falling and not negative, and directions
        ``[out, min(out, in)]``, orthonormal, fp64.
    """
    weights = delta.double()
    if delta.shape[0] <= delta.shape[1]:
        gram = weights @ weights.T if moment is None else weights @ moment.double() @ weights.T
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0).clamp(min=0), vectors.flip(1)
    root = weights if moment is None else weights @ torch.linalg.cholesky(moment.double())
    values, vectors = torch.linalg.eigh(root.T @ root)
    values = values.flip(0).clamp(min=0)
    smallest = torch.finfo(torch.float64).tiny
    return values, root @ vectors.flip(1) / values.sqrt().clamp(min=smallest)


def expected_best_ranks(values: Tensor, budget: int, costs: dict[int, int]) -> list[int]:
    """Return how many triplets to store at each precision for the least expected error.

    A triplet of variance ``λ`` stored at ``b`` bits is expected to leave ``λ (1 - (1 - d_b)²)``,
    ``d_b`` the distortion of a normal variable, and ``λ`` when it is dropped. The budget is met by
    the multiplier ``μ`` of ``error + μ · cost``.

    Args:
        values: ``λ``, falling.
        budget: Bits.
        costs: Bits of one triplet at each precision, precisions falling.
    """
    distortion = [GAUSSIAN_DISTORTION[b] if b < UNQUANTIZED else 1e-8 for b in costs]
    errors = torch.tensor([1.0] + [1 - (1 - d) ** 2 for d in distortion], dtype=torch.float64)
    prices = torch.tensor([0, *costs.values()], dtype=torch.float64)
    values = values.double().cpu()

    def ranks(multiplier: float) -> list[int]:
        choice = (values[:, None] * errors + multiplier * prices).argmin(dim=1)
        return torch.bincount(choice, minlength=len(prices))[1:].tolist()

    def spent(counts: list[int]) -> int:
        return sum(count * cost for count, cost in zip(counts, costs.values(), strict=True))

    if not len(values) or spent(ranks(0.0)) <= budget:
        return ranks(0.0)
    low, high = 0.0, float(values[0])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(ranks(middle)) > budget else (low, middle)
    return ranks(high)


def _most_affordable(cost: Callable[[int], int], most: int, budget: int) -> int:
    """Return the largest rank up to ``most`` whose rising cost stays within the budget."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _root_mean_square(vectors: Tensor) -> Tensor:
    """Return the size of each row's entries, ``[r, 1]``; not zero."""
    return (
        vectors.square().mean(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    )


def _power_of_two(delta: Tensor) -> float:
    """Return ``c`` with which ``σ`` of ``Δ / c`` fill the range of fp16: at most 2¹³ or so.

    Vectors have entries of size one, so ``σ <= ‖Δ‖_F / √(out · in)``.
    """
    size = float(delta.double().square().mean().sqrt())
    if size == 0:
        return 1.0
    return 2.0 ** max(-126, min(126, math.frexp(size)[1] - 13))
