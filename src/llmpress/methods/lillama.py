"""Lillama: low-rank weights, started from activations and trained by local feature distillation.

``W [out, in] ≈ A B`` with ``A [out, rank]`` and ``B [rank, in]``.

Source: Lillama, arXiv 2412.16719. Deviations: the engine trains block after block (the paper steps
all blocks in one forward pass), so the student's own hidden states come from finished blocks and
only two blocks are in memory; the default start is the optimum for the calibration text instead of
the plain SVD.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.layers.low_rank import LowRankLinear
from llmpress.methods.base import (
    InputStatistics,
    Method,
    Shape,
    Term,
    Tunable,
    checked_statistics,
    checked_weight,
)


@dataclass(frozen=True)
class Lillama(Method, Tunable):
    """Settings of Lillama; give ``reduction``, or ``rank`` for every matrix.

    Attributes:
        reduction: Share of the whole model's weights, embeddings included, to remove.
        rank: One rank for all matrices; one too large for a matrix leaves it dense.
        strategy: Where ranks fall: ``uniform`` over all layers, or only from the ``bottom``
            (``top``) of the model as far as the budget asks for.
        keep: With ``bottom`` and ``top``, share of a compressed matrix's weights that is kept.
        rank_step: Ranks are multiples of this.
        start: ``activations``: best for the calibration text; ``weights``: truncated SVD, the
            paper's.
        mode: Which hidden states the student block is trained on: the ``teacher``'s, the
            ``student``'s own, or ``both``, the paper's.
    """

    uses_statistics: ClassVar[bool] = True

    reduction: float | None = None
    rank: int | None = None
    strategy: Literal["uniform", "bottom", "top"] = "uniform"
    keep: float = 0.5
    rank_step: int = 8
    start: Literal["activations", "weights"] = "activations"
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

    def plan(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, float] | None = None,
    ) -> dict[str, Method | None]:
        """Give every layer a rank so that the whole model loses ``reduction`` of its weights.

        Raises:
            ValueError: More is asked for than the layers can give; names the largest reduction.
        """
        del sensitivity
        if self.rank is not None:
            ranks = {n: self.rank if _saves(s, self.rank) else None for n, s in shapes.items()}
        else:
            target = (self.reduction or 0.0) * model_weights
            smallest = sum(
                _removed(s, self._ranks(s)[0]) for s in shapes.values() if self._ranks(s)
            )
            if target > smallest:
                raise ValueError(
                    f"reduction={self.reduction}: at most {smallest / model_weights:.3f} of the "
                    f"model's weights can go (every matrix at rank {self.rank_step})"
                )
            ranks = self._uniform(shapes, target) if self.strategy == "uniform" else {}
            if self.strategy != "uniform":
                ranks = self._one_end(shapes, target)
        return {
            name: None if rank is None else replace(self, reduction=None, rank=rank)
            for name, rank in ranks.items()
        }

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
        if self.start == "weights":
            return LowRankLinear.from_factors(*svd_factors(checked, rank))
        moment = checked_statistics(statistics, checked).second_moment
        return LowRankLinear.from_factors(*activation_factors(checked, moment, rank))

    def loss_terms(self) -> tuple[Term, ...]:
        """Student block on the teacher's and on its own states, against the teacher block."""
        terms = {"teacher": Term("teacher", "teacher"), "student": Term("student", "teacher")}
        return tuple(terms.values()) if self.mode == "both" else (terms[self.mode],)

    def block_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over tokens of the mean absolute difference minus ``log σ(cos(output, target))``."""
        distance = (output - target).abs().mean(dim=-1)
        cosine = functional.cosine_similarity(output, target, dim=-1)
        return (distance - functional.logsigmoid(cosine)).mean()

    def _ranks(self, shape: Shape) -> list[int]:
        """Candidate ranks that make a matrix smaller, rising."""
        out_features, in_features = shape
        limit = (out_features * in_features - 1) // (out_features + in_features)
        return list(range(self.rank_step, limit + 1, self.rank_step))

    def _fitting_rank(self, shape: Shape, keep: float) -> int | None:
        """Return the largest candidate that keeps at most ``keep``, else the smallest one."""
        candidates = self._ranks(shape)
        fitting = [r for r in candidates if r * sum(shape) <= keep * shape[0] * shape[1]]
        return fitting[-1] if fitting else (candidates[0] if candidates else None)

    def _uniform(self, shapes: Mapping[str, Shape], target: float) -> dict[str, int | None]:
        low, high = 0.0, 1.0  # keeping `low` removes enough, keeping `high` may not
        for _ in range(40):
            keep = (low + high) / 2
            removed = sum(_removed(s, self._fitting_rank(s, keep)) for s in shapes.values())
            low, high = (keep, high) if removed >= target else (low, keep)
        return {name: self._fitting_rank(shape, low) for name, shape in shapes.items()}

    def _one_end(self, shapes: Mapping[str, Shape], target: float) -> dict[str, int | None]:
        ranks: dict[str, int | None] = dict.fromkeys(shapes)
        missing = target
        for name in shapes if self.strategy == "bottom" else reversed(list(shapes)):
            if missing <= 0:
                break
            shape = shapes[name]
            ranks[name] = self._fitting_rank(
                shape, max(self.keep, 1 - missing / (shape[0] * shape[1]))
            )
            missing -= _removed(shape, ranks[name])
        if missing > 0:
            reachable = (target - missing) / target * (self.reduction or 0.0)
            raise ValueError(
                f"reduction={self.reduction}: at keep={self.keep} at most {reachable:.3f} of "
                "the model's weights can go; lower keep"
            )
        return ranks


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A = U_r Σ_r^½`` and ``B = Σ_r^½ V_rᵀ`` of the truncated SVD."""
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = sigma[:rank].sqrt()
    return (U[:, :rank] * root).float(), (root.unsqueeze(1) * Vt[:rank]).float()


def activation_factors(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors that minimise ``E‖(W - A B) x‖²``.

    The optimum projects the outputs onto the leading eigenvectors of ``E[y yᵀ] = W H Wᵀ``:
    ``A = U_r``, ``B = U_rᵀ W``. It equals whitening by any ``S`` with ``S Sᵀ = H`` followed by a
    truncated SVD, but needs no inverse of ``S`` and so no damping when ``H`` is singular. Columns
    of A and rows of B are scaled to equal norms.

    Args:
        weight: ``W [out, in]``.
        second_moment: ``H [in, in]``.
        rank: Number of directions kept.
    """
    W = weight.double()
    _, vectors = torch.linalg.eigh(W @ second_moment.double() @ W.t())  # ascending
    U = vectors[:, -rank:].flip(1)  # [out, rank]
    B = U.t() @ W
    scale = B.norm(dim=1).clamp(min=1e-30).sqrt()  # [rank]
    return (U * scale).float(), (B / scale.unsqueeze(1)).float()


def _saves(shape: Shape, rank: int) -> bool:
    return rank * sum(shape) < shape[0] * shape[1]


def _removed(shape: Shape, rank: int | None) -> int:
    return 0 if rank is None else shape[0] * shape[1] - rank * sum(shape)
