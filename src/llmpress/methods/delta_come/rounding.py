"""Round the singular triplets of a delta, group after group, each error fed back into what follows.

Dimensions: as in `llmpress.methods.delta_come`.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmpress.nn.layers.mixed_low_rank import UNQUANTIZED, Vectors, dequantize_vectors
from llmpress.numerics.error_feedback import feed_errors_back
from llmpress.numerics.grids import SMALLEST_SCALE, fit_grid
from llmpress.numerics.linalg import damped_inverse_cholesky
from llmpress.numerics.low_rank import OutputDirections

SYSTEM_DAMPENING = 1e-4
"""Added to what is factorized, as a fraction of its mean diagonal entry."""

LARGEST_SIGMA = 65504.0
"""The largest fp16 number."""


class Group(NamedTuple):
    """Singular triplets that share a precision."""

    rank: int
    num_bits: int


def groups_of(ranks: Sequence[int], precisions: Sequence[int]) -> list[Group]:
    """Return the groups that hold a triplet."""
    return [Group(r, b) for r, b in zip(ranks, precisions, strict=True) if r]


class Rounded(NamedTuple):
    """Rounded triplets ``(V, U, σ)`` of every group, and what they leave of the delta."""

    vectors: list[tuple[Vectors, Vectors, Tensor]]
    residual: Tensor


class TripletRounding:
    """Rounds the triplets of one delta, group after group.

    Args:
        moment: Dampened ``H [in, in]``.
        importance: ``G [out]`` that the directions were found with; None if all outputs count
            alike.
        group_size: Consecutive channels of a singular vector that share a scale and a zero point.
        search_range: Whether grids have the range of the least squared error.
        correct_left: Whether left vectors are solved for anew once the right ones are rounded.
        act_order: Whether errors are fed from the largest inputs to the smallest.

    Attributes:
        notes: Dampening that the factorizations took, as a fraction of the mean diagonal entry, and
            the seconds of each step.
    """

    def __init__(
        self,
        moment: Tensor,
        importance: Tensor | None,
        *,
        group_size: int,
        search_range: bool,
        correct_left: bool,
        act_order: bool,
    ) -> None:
        self.moment = moment
        self.root = None if importance is None else importance.double().sqrt()
        self.group_size, self.search_range = group_size, search_range
        self.correct_left, self.act_order = correct_left, act_order
        self.channels = _Feedback(moment, act_order=act_order)
        self.notes = {
            "right_dampening": self.channels.dampening,
            "left_dampening": 0.0,
            "right_seconds": 0.0,
            "left_seconds": 0.0,
        }

    def round_all(
        self, delta: Tensor, directions: OutputDirections, groups: Sequence[Group]
    ) -> Rounded:
        """Round group after group; each sees what the ones before have left.

        Args:
            delta: ``[out, in]``.
            directions: Of the weighted outputs.
            groups: How many of them have which precision.
        """
        done: list[tuple[Vectors, Vectors, Tensor]] = []
        residual = delta
        leading = directions.leading(sum(group.rank for group in groups))
        for rank, num_bits in groups:
            own, leading = leading[:, :rank], leading[:, rank:]
            started = time.perf_counter()
            V, left = self._right(residual, own, num_bits)
            rounded = time.perf_counter()
            stored = dequantize_vectors(V, self.group_size)  # [r, in]
            U, sigma = self._left(residual, stored, left, num_bits)
            A = dequantize_vectors(U, self.group_size) * sigma.float()[:, None]  # [r, out]
            residual = residual - A.T @ stored
            done.append((V, U, sigma))
            self.notes["right_seconds"] += rounded - started
            self.notes["left_seconds"] += time.perf_counter() - rounded
        return Rounded(done, residual)

    def _right(self, delta: Tensor, basis: Tensor, num_bits: int) -> tuple[Vectors, Tensor]:
        """Round ``V [r, in]``, and return the left vectors that belong to it, ``[r, out]``.

        The error of a channel goes into the channels still to come.
        """
        toward = basis if self.root is None else basis * self.root[:, None]  # G^½ U
        right = (toward.T @ delta.double()).float()  # [r, in]
        norms = _root_mean_square(right)
        away = basis if self.root is None else basis / self.root[:, None]  # G^-½ U
        left = away.T.float() * norms
        return self._round(right / norms, num_bits, self.channels, along_vectors=True), left

    def _left(
        self, delta: Tensor, stored: Tensor, left: Tensor, num_bits: int
    ) -> tuple[Vectors, Tensor]:
        """Round ``U [r, out]``; the error of a triplet goes into the triplets still to come.

        The triplets are the inputs of ``Uᵀ [out, r]``, while scales run along ``out``, each within
        one triplet.

        Args:
            delta: What is left of the delta, ``[out, in]``.
            stored: The rounded ``V [r, in]``.
            left: The left vectors before any rounding, ``[r, out]``.
            num_bits: The group's precision.

        Returns:
            ``U`` and fp16 ``σ [r]``.
        """
        seen = stored @ self.moment  # [r, in]
        gram = seen @ stored.T  # [r, r]
        if self.correct_left:
            damped = gram.double()
            damped.diagonal().add_(SYSTEM_DAMPENING * damped.diagonal().mean())
            left = torch.linalg.solve(damped, (seen @ delta.T).double()).float()
        sigma = _root_mean_square(left)[:, 0].clamp(SMALLEST_SCALE, LARGEST_SIGMA).to(torch.float16)
        weights = sigma.float()[:, None]  # [r, 1]
        triplets = _Feedback(gram * weights * weights.T, act_order=self.act_order)
        self.notes["left_dampening"] = max(self.notes["left_dampening"], triplets.dampening)
        return self._round(left / weights, num_bits, triplets, along_vectors=False), sigma

    def _round(
        self, vectors: Tensor, num_bits: int, feedback: "_Feedback", *, along_vectors: bool
    ) -> Vectors:
        """Round ``vectors [r, n]`` with feedback along each of them, or from one to the next."""
        if num_bits == UNQUANTIZED:
            return Vectors(vectors.to(torch.float16))
        group_size = self.group_size
        grid = fit_grid(vectors, num_bits, group_size, search=self.search_range)
        scales, zeros = (
            part.float().repeat_interleave(group_size, dim=1)[:, : vectors.shape[1]]
            for part in grid
        )
        if along_vectors:
            codes = feedback.round(vectors.T, scales.T, zeros.T, num_bits).T.contiguous()
        else:
            codes = feedback.round(vectors, scales, zeros, num_bits)
        return Vectors(codes, *grid)


class _Feedback:
    """Rounding with error feedback over inputs whose moment is factorized once.

    Args:
        moment: ``[n, n]``, positive semi-definite.
        act_order: Go from the largest input to the smallest.

    Attributes:
        dampening: What was added to the moment's diagonal, as a fraction of its mean.
    """

    def __init__(self, moment: Tensor, *, act_order: bool) -> None:
        self.order = torch.arange(len(moment), device=moment.device)
        if act_order:
            self.order = moment.diagonal().argsort(descending=True, stable=True)
        ordered = moment[self.order][:, self.order]
        self.factor, self.dampening, _ = damped_inverse_cholesky(ordered, SYSTEM_DAMPENING)

    def round(self, inputs: Tensor, scales: Tensor, zeros: Tensor, num_bits: int) -> Tensor:
        """Return the int32 codes of ``inputs [n, rows]``, row by row."""
        columns = [tensor[self.order].contiguous() for tensor in (inputs, scales, zeros)]
        codes = feed_errors_back(columns[0], self.factor, columns[1], columns[2], num_bits)
        return torch.empty_like(codes).index_copy_(0, self.order, codes)


def _root_mean_square(vectors: Tensor) -> Tensor:
    """Return the size of each row's entries, ``[r, 1]``; not zero."""
    return (
        vectors.square().mean(dim=1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    )


def power_of_two(delta: Tensor) -> float:
    """Return ``c`` with which ``σ`` of ``Δ / c`` fill the range of fp16: at most 2¹³ or so.

    Vectors have entries of size one, so ``σ <= ‖Δ‖_F / √(out · in)``.
    """
    size = float(delta.double().square().mean().sqrt())
    if size == 0:
        return 1.0
    return 2.0 ** max(-126, min(126, math.frexp(size)[1] - 13))
