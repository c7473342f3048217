"""Lillama: low-rank weights, started from activations and trained by local feature distillation.

Source: Lillama, arXiv 2412.16719. Deviations: the engine trains block after block (the paper steps
all blocks in one forward pass), so the student's own hidden states come from finished blocks and
only two blocks are in memory. By default the start is the optimum for the calibration text and the
loss instead of the plain SVD, ranks go where the loss feels them, and a matrix of rank r is stored
without the ``r²`` redundant numbers of two factors; the paper's choices are settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.methods.base import (
    InputStatistics,
    Method,
    Need,
    Sensitivity,
    Shape,
    Term,
    Tunable,
    Work,
    checked_statistics,
    checked_weight,
)
from llmpress.methods.lillama.budget import (
    Budget,
    Form,
    Ranks,
    candidate_ranks,
    num_stored,
    ranks_by_loss,
    ranks_from_one_end,
    uniform_ranks,
)
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.nn.layers.pivoted_low_rank import PivotedLowRankLinear
from llmpress.numerics.low_rank import output_energy, output_factors, svd_cubes, weight_factors


@dataclass(frozen=True)
class Lillama(Method, Tunable):
    """Settings of Lillama; give ``reduction``, or ``rank`` for every matrix.

    Attributes:
        reduction: Share of the whole model's weights, embeddings included, to remove.
        rank: One rank for all matrices; one too large for a matrix leaves it dense.
        strategy: Where ranks fall: ``loss``: where they cost the least, as far as statistics tell,
            and ``uniform`` without any; ``uniform``: the same share of every layer is kept;
            ``bottom`` (``top``): only from one end of the model, as far as the budget asks for.
        keep: With ``bottom`` and ``top``, share of a compressed matrix's weights that is kept.
        rank_step: Ranks are multiples of this.
        start: ``loss``: best for the calibration text, outputs weighted by how much the loss feels
            them, where that was measured; ``activations``: all outputs alike; ``weights``:
            truncated SVD, the paper's.
        form: How a matrix is stored: ``pivoted``, as some of its rows and the others in terms of
            them; ``factors``: two plain linears, the paper's.
        mode: Which hidden states the student block is trained on: the ``teacher``'s, the
            ``student``'s own, or ``both``, the paper's.
    """

    uses_statistics: ClassVar[bool] = True

    reduction: float | None = None
    rank: int | None = None
    strategy: Literal["loss", "uniform", "bottom", "top"] = "loss"
    keep: float = 0.5
    rank_step: int = 8
    start: Literal["loss", "activations", "weights"] = "loss"
    form: Form = "pivoted"
    mode: Literal["both", "teacher", "student"] = "both"

    def __post_init__(self) -> None:
        if (self.reduction is None) == (self.rank is None):
            raise ValueError("lillama: give either reduction or rank")
        if self.reduction is not None and not 0 < self.reduction < 1:
            raise ValueError(f"reduction={self.reduction}: allowed is more than 0 and less than 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be positive")
        if not 0 < self.keep < 1 or self.rank_step < 1:
            raise ValueError(f"keep={self.keep}, rank_step={self.rank_step}: out of range")

    @property
    def need(self) -> Need:
        """Statistics are needed unless it starts from the weights, and spread a budget."""
        if self.start != "weights":
            return "needed"
        return "used" if self.spreads_budget else "not used"

    @property
    def spreads_budget(self) -> bool:
        """Whether there is a budget, to be spread by what each rank costs."""
        return self.reduction is not None and self.strategy == "loss"

    def sensitivity(self, weight: Tensor, statistics: InputStatistics) -> list[float]:
        """Return ``E Σ_o g_o (y_o - ŷ_o)²`` at every candidate rank, of the best start there is.

        Where the loss's gradients were not measured, nothing compares two layers: then it is the
        share of the outputs' energy that is lost, times the number of weights.
        """
        checked = checked_weight(weight)
        known = checked_statistics(statistics, checked)
        importance = known.output_importance
        energy = output_energy(checked, known.second_moment, importance)
        lost = energy.sum() - energy.cumsum(0)
        if known.output_sensitivity is not None and importance is None:  # nothing is felt
            lost *= 0
        elif importance is None:
            lost *= checked.numel() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
        ranks = candidate_ranks(Shape(*checked.shape), self.rank_step, self.form)
        return [max(0.0, float(lost[rank - 1])) for rank in ranks]

    def plan(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, Sensitivity] | None = None,
    ) -> dict[str, Method | None]:
        """Give every layer a rank so that the whole model loses ``reduction`` of its weights.

        Raises:
            ValueError: More is asked for than the layers can give; names the largest reduction.
        """
        if self.rank is not None:
            ranks: Ranks = {
                name: self.rank if self._saves(shape) else None for name, shape in shapes.items()
            }
        else:
            ranks = self._planned_ranks(shapes, model_weights, sensitivity)
        return {
            name: None if rank is None else replace(self, reduction=None, rank=rank)
            for name, rank in ranks.items()
        }

    def _saves(self, shape: Shape) -> bool:
        if self.rank is None or self.rank >= min(shape):
            return False
        return num_stored(shape, self.rank, self.form) < num_stored(shape, None, self.form)

    def _planned_ranks(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, Sensitivity] | None,
    ) -> Ranks:
        wanted = self.reduction or 0.0
        budget = Budget(shapes, wanted * model_weights, self.rank_step, self.form)
        one_end = self.strategy in ("bottom", "top")
        most = budget.most(keep=self.keep if one_end else 0.0)
        if budget.removed > most:
            how = f"keep={self.keep}; lower keep" if one_end else f"rank {self.rank_step}"
            raise ValueError(
                f"reduction={self.reduction}: at most {most / model_weights:.3f} of the "
                f"model's weights can go (every matrix at {how})"
            )
        if one_end:
            return ranks_from_one_end(budget, self.keep, top=self.strategy == "top")
        if self.strategy == "uniform" or sensitivity is None:
            return uniform_ranks(budget)
        return ranks_by_loss(
            budget, {name: cast("list[float]", losses) for name, losses in sensitivity.items()}
        )

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> LowRankLinear:
        """Factor ``weight [out, in]`` at this object's rank."""
        del seed
        checked = checked_weight(weight)
        if self.rank is None:
            raise ValueError(
                "lillama: plan() turns a reduction into ranks before a matrix is compressed"
            )
        rank = min(self.rank, *checked.shape)
        pivoted = self.form == "pivoted"
        layer = self._layer
        if self.start == "weights":
            return layer.from_factors(*weight_factors(checked, rank, balanced=not pivoted))
        known = checked_statistics(statistics, checked)
        importance = known.output_importance if self.start == "loss" else None
        factors = output_factors(
            checked, known.second_moment, rank, importance, balanced=not pivoted
        )
        return layer.from_factors(*factors)

    @property
    def _layer(self) -> type[LowRankLinear]:
        return PivotedLowRankLinear if self.form == "pivoted" else LowRankLinear

    def empty_layer(self, shape: Shape) -> LowRankLinear:
        """Return factors of this object's rank."""
        return self._layer.empty(shape, rank=min(self.rank or 1, *shape))

    def work(self, shape: Shape) -> Work:
        """Return the work of the outputs' directions, and of the factors."""
        o, n = shape
        rank = min(self.rank or 1, o, n)
        if self.start == "weights":
            return Work(svd_cubes=1.7 * svd_cubes(o, n), bytes_moved=60.0 * o * n)
        small = min(shape)
        tall = o > n  # then the second moment is decomposed, too, and directions made orthonormal
        directions = Work(
            fp64_flops=2.0 * o * n * n + 2.0 * small * o * n + (6.0 * o * n * n if tall else 0.0),
            eigh_cubes=float(small) ** 3 * (2 if tall else 1),
        )
        times = 2 if self.strategy == "loss" else 1  # to weigh the layers, and here
        pivoting = 6.0 * rank * rank * o if self.form == "pivoted" else 0.0
        factors = Work(fp64_flops=2.0 * rank * o * n + pivoting, bytes_moved=60.0 * o * n)
        return directions * times + factors

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the matrix and of its square ones, in fp64."""
        if self.start == "weights":
            return 8 * (5 * shape.num_weights + 6 * min(shape) ** 2)
        return 8 * (5 * shape.num_weights + 3 * shape.in_features**2 + 5 * min(shape) ** 2)

    def loss_terms(self) -> tuple[Term, ...]:
        """Student block on the teacher's and on its own states, against the teacher block."""
        terms = {"teacher": Term("teacher", "teacher"), "student": Term("student", "teacher")}
        return tuple(terms.values()) if self.mode == "both" else (terms[self.mode],)

    def block_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over tokens of the mean absolute difference minus ``log σ(cos(output, target))``."""
        distance = (output - target).abs().mean(dim=-1)
        cosine = functional.cosine_similarity(output, target, dim=-1)
        return (distance - functional.logsigmoid(cosine)).mean()
