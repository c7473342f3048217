"""Delta-CoMe: singular triplets of a delta in groups of falling precision, under a true bit budget.

Dimensions: ``Δ [out, in]`` the delta, ``H = E[x xᵀ] [in, in]``, ``G [out]`` how much the loss feels
an error of each output, ``Δ ≈ Σ_i u_i σ_i v_iᵀ`` with ``u_i [out]``, ``v_i [in]``; a group holds
``r`` triplets as rows ``U [r, out]`` and ``V [r, in]``. docs/methods/delta_come.md derives each
step.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from llmpress.methods.base import (
    InputStatistics,
    Method,
    Sensitivity,
    Shape,
    Work,
    checked_statistics,
    checked_weight,
)
from llmpress.methods.delta_come.budget import (
    best_sizes,
    distortion,
    expected_best_ranks,
    expected_error,
    most_affordable,
    num_meaningful,
)
from llmpress.methods.delta_come.rounding import Group, TripletRounding, groups_of, power_of_two
from llmpress.nn.layers.mixed_low_rank import (
    SCALE_BITS,
    UNQUANTIZED,
    MixedLowRankLinear,
    group_bits,
)
from llmpress.numerics.grids import fitting_bytes
from llmpress.numerics.low_rank import OutputDirections

PAPER_WIDTH = 4096
"""Matrix width that ``ranks`` are meant for; narrower matrices take proportionally fewer."""

SIZES = tuple(2.0 ** (quarter / 4) for quarter in range(-4, 5))
"""What a matrix may get of the model's bits per weight: half to double.

With an eighth to eight times the divergence rises again: sensitivities of single matrices are not
known well enough for that.
"""


@dataclass(frozen=True)
class DeltaCoMe(Method):
    """Mixed-precision low rank; the defaults go beyond the paper, see docs/methods/delta_come.md.

    Attributes:
        bits: Budget in bits per weight, everything stored included; with ``allocation: model`` over
            all matrices together, otherwise of each one.
        precisions: Bits of the groups of triplets, falling; 1 to 8, or 16 for fp16.
        allocation: Who decides how many triplets get which precision. ``matrix``: a program of the
            least expected error of each matrix, all with the same bits; ``model``: another one
            above it, over all matrices, which gives each half to double the bits; ``greedy``: a
            search on the error measured on the calibration inputs, the paper's; ``fixed``:
            ``ranks``.
        ranks: With ``fixed``, number of triplets of every group but the last, for matrices of width
            4096 and in proportion for narrower ones; the last group takes the rest of the budget.
        group_size: Consecutive channels of a singular vector that share a scale and a zero point.
        cut_penalty: How much worse a dropped triplet is taken to be than the same error by rounding
            when triplets are shared out; at least 1. What is dropped is missing in every layer in
            the same direction, while rounding errors cancel.
        search_range: Whether the range of a grid is the one with the least squared error instead of
            the smallest to the largest entry.
        basis: Directions in which the delta is cut into triplets: ``weight``: those of the delta
            itself; ``output``: those of the layer's outputs on calibration inputs; ``loss``: the
            same, each output weighted by how much the loss feels it, as far as that was measured.
        correct_left: Whether the left vectors are solved for anew once the right ones are rounded.
        act_order: Whether error feedback goes from the largest inputs to the smallest.
        dampening: Added to the diagonal of ``H``, as a fraction of its mean.
    """

    uses_statistics = True
    size_from_shape = False

    bits: float = 1.0
    precisions: tuple[int, ...] = (8, 5, 4, 3, 2)
    allocation: Literal["matrix", "model", "greedy", "fixed"] = "matrix"
    ranks: tuple[int, ...] | None = None
    cut_penalty: float = 3.0
    group_size: int = 128
    search_range: bool = False
    basis: Literal["weight", "output", "loss"] = "weight"
    correct_left: bool = True
    act_order: bool = True
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
        if self.allocation not in ("matrix", "model", "greedy", "fixed"):
            raise ValueError(
                f"allocation={self.allocation!r}: allowed are 'matrix', 'model', 'greedy', 'fixed'"
            )
        if (self.ranks is not None) != (self.allocation == "fixed"):
            raise ValueError(
                f"ranks={self.ranks}, allocation={self.allocation!r}: 'fixed' needs ranks, "
                "and nothing else takes them"
            )
        if self.ranks is not None and (
            len(self.ranks) != len(self.precisions) - 1 or min(self.ranks, default=1) < 1
        ):
            raise ValueError(
                f"ranks={list(self.ranks)}: a positive number for each of precisions "
                f"{list(self.precisions[:-1])} is needed; the last group takes the rest"
            )
        if not 1 <= self.cut_penalty < math.inf:
            raise ValueError(f"cut_penalty={self.cut_penalty}: must be at least 1 and finite")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be positive")
        if self.basis not in ("weight", "output", "loss"):
            raise ValueError(f"basis={self.basis!r}: allowed are 'weight', 'output' and 'loss'")
        if not 0 <= self.dampening < 1:
            raise ValueError(f"dampening={self.dampening}: allowed are 0 to below 1")

    @property
    def spreads_budget(self) -> bool:
        """Whether matrices get different shares of the budget."""
        return self.allocation == "model"

    def sensitivity(self, weight: Tensor, statistics: InputStatistics) -> list[float]:
        """Return the expected rise of the loss at each of `SIZES` that pays for a triplet.

        Where the loss's gradients were not measured, nothing compares two layers: then it is the
        share of the outputs' energy that is lost, times the number of weights.
        """
        delta = checked_weight(weight)
        shape = Shape(*delta.shape)
        importance = checked_statistics(statistics, delta).output_importance
        energy = self._directions(delta, self._moment(delta, statistics), importance).energy.cpu()
        if statistics.output_sensitivity is not None and importance is None:  # nothing is felt
            energy = energy * 0
        elif importance is None:
            smallest = torch.finfo(energy.dtype).tiny
            energy = energy * (delta.numel() / energy.sum().clamp(min=smallest))
        left = self._errors_left(shape)
        return [
            expected_error(energy, self._expected_ranks(energy, bits, shape), left)
            for bits in self._sizes(shape)
        ]

    def plan(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, Sensitivity] | None = None,
    ) -> dict[str, Method | None]:
        """Give every matrix its bits; all the same without sensitivities.

        Raises:
            ValueError: The budget is too small for some layer; names the smallest that is not.
        """
        same = super().plan(shapes, model_weights)
        if not self.spreads_budget or not sensitivity:
            return same
        sizes = {name: self._sizes(shape) for name, shape in shapes.items()}
        costs = {
            name: [int(bits * shape.out_features * shape.in_features) for bits in sizes[name]]
            for name, shape in shapes.items()
        }
        budget = int(self.bits * sum(s.out_features * s.in_features for s in shapes.values()))
        errors = {name: cast("list[float]", sensitivity[name]) for name in shapes}
        chosen = best_sizes(errors, costs, budget)
        return {
            name: replace(self, bits=sizes[name][size], allocation="matrix")
            for name, size in chosen.items()
        }

    def _sizes(self, shape: Shape) -> list[float]:
        """Return the budgets, in bits per weight, that a matrix may get."""
        least = self.smallest_bits(shape)
        return [self.bits * size for size in SIZES if size == 1 or self.bits * size >= least]

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> MixedLowRankLinear:
        """Compress a delta ``weight [out, in]``; the seed is not used.

        Without statistics every input counts alike: ``H`` is the identity.

        Returns:
            The layer; its notes hold the dampening that the factorizations took, as a fraction of
            the mean diagonal entry, and the seconds of each step.

        Raises:
            ValueError: A delta that is no finite float matrix, statistics of another size, or a
                budget too small for a single triplet; names the smallest possible one.

        Source: arXiv 2406.08903, section 4. Deviations in docs/methods/delta_come.md.
        """
        del seed
        delta = checked_weight(weight)
        moment = self._moment(delta, statistics)
        importance = statistics.output_importance if statistics is not None else None
        scale = power_of_two(delta)
        started = time.perf_counter()
        directions = self._directions(delta / scale, moment, importance)
        seconds = {"directions_seconds": time.perf_counter() - started}
        groups = self.plan_groups(directions.energy, *delta.shape)
        weighted = importance if self.basis == "loss" else None
        rounding = TripletRounding(
            moment,
            weighted,
            group_size=self.group_size,
            search_range=self.search_range,
            correct_left=self.correct_left,
            act_order=self.act_order,
        )
        if self.allocation == "greedy":
            groups = self._search_groups(groups, delta / scale, directions, rounding)
        done = rounding.round_all(delta / scale, directions, groups)
        layer = MixedLowRankLinear.from_vectors(
            [V for V, _, _ in done.vectors],
            [U for _, U, _ in done.vectors],
            torch.cat([delta.new_zeros(0), *(sigma for _, _, sigma in done.vectors)]),
            scale,
            num_bits=[group.num_bits for group in groups],
            group_size=self.group_size,
            shape=(delta.shape[0], delta.shape[1]),
        )
        layer.notes = {**seconds, **rounding.notes}
        return layer

    def empty_layer(self, shape: Shape) -> MixedLowRankLinear:
        """Return the groups for singular values that fall like the inverse, as they often do.

        Any falling row spends the budget up to less than one triplet.
        """
        with torch.device("cpu"):
            variances = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -2
            groups = [group._asdict() for group in self.plan_groups(variances, *shape)]
        return MixedLowRankLinear.empty(shape, groups=groups, group_size=self.group_size)

    def work(self, shape: Shape) -> Work:
        """Return the work of the directions, and of rounding triplets one by one."""
        o, n = shape
        layer, small = self.empty_layer(shape), min(shape)
        of_outputs = float(self.basis != "weight")
        gram = 4.0 * o * n * small + of_outputs * 2.0 * o * n * n
        bases = small**3 + of_outputs * (o > n) * float(n) ** 3
        per_entry = 600.0 + fitting_bytes(self.search_range)
        return Work(
            fp64_flops=gram + 2.0 * layer.rank * o * n,
            fp32_flops=2.0 * n**3 + layer.rank * (4.0 * o * n + 3.0 * n * n),
            eigh_cubes=bases * (2 if self.spreads_budget else 1),
            bytes_moved=per_entry * layer.rank * (o + n) + 120.0 * o * n,
            calls=14.0 * (n * len(layer.groups) + layer.rank) + 2000.0,
        )

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the delta in fp32 and fp64, and of the square matrices."""
        moment = shape.in_features**2 * (16 if self.basis != "weight" else 12)
        return 32 * shape.num_weights + 40 * min(shape) ** 2 + moment

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

    def _directions(
        self, delta: Tensor, moment: Tensor, importance: Tensor | None
    ) -> OutputDirections:
        """Return the directions that the delta is cut along."""
        identity = torch.eye(delta.shape[1], device=delta.device)
        return OutputDirections(
            delta,
            identity if self.basis == "weight" else moment,
            importance if self.basis == "loss" else None,
        )

    def smallest_bits(self, shape: Shape) -> float:
        """Return the bits of a single triplet at the lowest precision."""
        out_features, in_features = shape
        last = self.precisions[-1]
        bits = group_bits(in_features, out_features, 1, last, self.group_size) + SCALE_BITS
        return bits / (out_features * in_features)

    def plan_groups(self, values: Tensor, out_features: int, in_features: int) -> list[Group]:
        """Spend the budget on groups; none for a delta of zeros.

        Args:
            values: Variances of the triplets, falling.
            out_features: Of the matrix.
            in_features: Of the matrix.
        """
        shape = Shape(out_features, in_features)
        least = self.smallest_bits(shape)
        if self._budget(self.bits, shape) < self._cost(shape, self.precisions[-1], 1):
            raise ValueError(
                f"bits={self.bits}: too small for one triplet at {self.precisions[-1]} bits of "
                f"shape {list(shape)}; the smallest possible budget is "
                f"{math.ceil(1e4 * least) / 1e4:.4f}"
            )
        if self.ranks is None:
            ranks = self._expected_ranks(values, self.bits, shape)
        else:
            fraction = min(1.0, min(shape) / PAPER_WIDTH)
            wanted = [max(1, round(rank * fraction)) for rank in self.ranks] + [0]
            ranks = self._affordable(wanted, num_meaningful(values), self.bits, shape)
        return groups_of(ranks, self.precisions)

    def _budget(self, bits: float, shape: Shape) -> int:
        return int(bits * shape.out_features * shape.in_features) - SCALE_BITS

    def _cost(self, shape: Shape, num_bits: int, rank: int) -> int:
        return group_bits(shape.in_features, shape.out_features, rank, num_bits, self.group_size)

    def _expected_ranks(self, values: Tensor, bits: float, shape: Shape) -> list[int]:
        """Return the ranks of the least expected error."""
        meaningful = num_meaningful(values)
        costs = [self._cost(shape, num_bits, 1) for num_bits in self.precisions]
        wanted = expected_best_ranks(
            values[:meaningful], self._budget(bits, shape), costs, self._errors_left(shape)
        )
        return self._affordable(wanted, meaningful, bits, shape)

    def _errors_left(self, shape: Shape) -> list[float]:
        """Return what rounding to each precision leaves of a triplet, against dropping it."""

        def kept(num_bits: int, length: int) -> float:
            group_size = min(self.group_size, length)
            return 1 - distortion(num_bits, group_size, search=self.search_range)

        lost = [1 - math.prod(kept(bits, side) for side in shape) for bits in self.precisions]
        return [share / self.cut_penalty for share in lost]

    def _affordable(
        self, wanted: Sequence[int], num_triplets: int, bits: float, shape: Shape
    ) -> list[int]:
        """Cut ranks to what the budget pays for; the last group takes what is left of it."""
        budget, ranks = self._budget(bits, shape), []
        for number, (rank, num_bits) in enumerate(zip(wanted, self.precisions, strict=True)):
            most = num_triplets if number == len(wanted) - 1 else min(rank, num_triplets)
            ranks.append(most_affordable(partial(self._cost, shape, num_bits), most, budget))
            budget -= self._cost(shape, num_bits, ranks[-1]) if ranks[-1] else 0
            num_triplets -= ranks[-1]
        return ranks

    def _search_groups(
        self,
        start: list[Group],
        delta: Tensor,
        directions: OutputDirections,
        rounding: TripletRounding,
    ) -> list[Group]:
        """Search ranks group by group, from the highest precision down, on the measured error.

        Every group but the last starts empty and doubles as long as the error falls; the last one
        takes the rest of the budget.
        """
        shape, count = Shape(*delta.shape), num_meaningful(directions.energy)
        if not start:
            return start

        def attempt(ranks: Sequence[int]) -> tuple[float, list[Group]]:
            groups = groups_of(self._affordable(ranks, count, self.bits, shape), self.precisions)
            left = rounding.round_all(delta, directions, groups).residual
            return float(((left @ rounding.moment) * left).sum()), groups

        ranks = [0] * len(self.precisions)
        least, best = attempt(ranks)
        for position in range(len(ranks) - 1):
            rank = 1
            while rank <= count:
                error, groups = attempt([*ranks[:position], rank, *ranks[position + 1 :]])
                if error >= least:
                    break
                least, best, ranks[position] = error, groups, rank
                rank *= 2
        return best
