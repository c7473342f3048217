"""Ranks of low-rank matrices under one budget of parameters.

A rank of None leaves a matrix dense. Sizes are in numbers of 16 bits, the dtype of the factors.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from llmpress.methods.base import Shape

Form = Literal["factors", "pivoted"]
"""How a matrix of some rank is stored: `llmpress.nn.layers.low_rank` and `.pivoted_low_rank`."""

Ranks = dict[str, int | None]


def num_stored(shape: Shape, rank: int | None, form: Form) -> int:
    """Return the numbers that a matrix of this rank takes."""
    out_features, in_features = shape
    if rank is None:
        return out_features * in_features
    if form == "factors":
        return rank * (out_features + in_features)
    place = 1 if out_features <= 1 << 15 else 2  # numbers that hold where an output is
    return rank * (out_features + in_features - rank) + place * out_features


def candidate_ranks(shape: Shape, step: int, form: Form) -> list[int]:
    """Return the multiples of ``step`` at which a matrix is stored smaller than dense, rising."""
    dense = num_stored(shape, None, form)
    ranks = range(step, min(shape), step)
    return [rank for rank in ranks if num_stored(shape, rank, form) < dense]


class Budget(NamedTuple):
    """What is to be removed from a model, and how.

    Attributes:
        shapes: Every compressible matrix, from the bottom of the model upwards.
        removed: Numbers to remove, at least.
        step: Ranks are multiples of it.
        form: How the factors are stored.
    """

    shapes: Mapping[str, Shape]
    removed: float
    step: int
    form: Form

    def candidates(self, name: str) -> list[int]:
        """Return the ranks that a matrix may get, rising."""
        return candidate_ranks(self.shapes[name], self.step, self.form)

    def saved(self, name: str, rank: int | None) -> int:
        """Return how many numbers a rank removes."""
        shape = self.shapes[name]
        return num_stored(shape, None, self.form) - num_stored(shape, rank, self.form)

    def most(self, keep: float = 0.0) -> int:
        """Return what goes when each matrix keeps this share, or as little as it can."""
        return sum(self.saved(name, self.rank_keeping(name, keep)) for name in self.shapes)

    def rank_keeping(self, name: str, share: float) -> int | None:
        """Return the largest candidate that keeps at most ``share`` of a matrix, else the least."""
        candidates = self.candidates(name)
        limit = share * num_stored(self.shapes[name], None, self.form)
        fitting = [r for r in candidates if num_stored(self.shapes[name], r, self.form) <= limit]
        return fitting[-1] if fitting else (candidates[0] if candidates else None)


def uniform_ranks(budget: Budget) -> Ranks:
    """Keep the same share of every matrix: the largest that meets the budget."""
    low, high = 0.0, 1.0  # keeping `low` removes enough, keeping `high` may not
    for _ in range(40):
        share = (low + high) / 2
        low, high = (share, high) if budget.most(keep=share) >= budget.removed else (low, share)
    return {name: budget.rank_keeping(name, low) for name in budget.shapes}


def ranks_from_one_end(budget: Budget, keep: float, *, top: bool) -> Ranks:
    """Compress matrix after matrix to ``keep``, from the bottom (top) until the budget is met."""
    ranks: Ranks = dict.fromkeys(budget.shapes)
    missing = budget.removed
    for name in reversed(list(budget.shapes)) if top else budget.shapes:
        if missing <= 0:
            break
        dense = num_stored(budget.shapes[name], None, budget.form)
        ranks[name] = budget.rank_keeping(name, max(keep, 1 - missing / dense))
        missing -= budget.saved(name, ranks[name])
    return ranks


def ranks_by_loss(budget: Budget, losses: Mapping[str, Sequence[float]]) -> Ranks:
    """Remove what costs the least loss.

    Minimises the sum of losses under the budget: from dense matrices downwards, whichever step
    along some matrix's convex frontier of loss against size costs the least loss per number is
    taken, until enough is removed; the last matrix gets back what was removed too much.

    Args:
        budget: What is to be removed.
        losses: Of each matrix, the rise of the loss at each of its candidate ranks.
    """
    steps = []
    for order, name in enumerate(budget.shapes):
        points = [(0, 0.0, None), *_points(budget, name, losses[name])]
        frontier = _convex(points)
        for (saved, loss, _), (more, higher, rank) in pairwise(frontier):
            steps.append(((higher - loss) / (more - saved), order, more - saved, name, rank))
    ranks: Ranks = dict.fromkeys(budget.shapes)
    missing = budget.removed
    for _, _, saved, name, rank in sorted(steps, key=lambda step: step[:2]):
        if missing <= 0:
            break
        ranks[name] = rank
        missing -= saved
        last = name
    if missing < 0:
        spare = budget.saved(last, ranks[last]) + missing  # what this matrix has to give
        enough = [r for r in budget.candidates(last) if budget.saved(last, r) >= spare]
        ranks[last] = enough[-1]
    return ranks


Point = tuple[int, float, int | None]
"""Numbers saved, loss, rank."""


def _points(budget: Budget, name: str, losses: Sequence[float]) -> list[Point]:
    """Return the points of all candidate ranks, from the largest rank down."""
    rising = zip(budget.candidates(name), losses, strict=True)
    points: list[Point] = [(budget.saved(name, rank), loss, rank) for rank, loss in rising]
    return points[::-1]


def _convex(points: Sequence[Point]) -> list[Point]:
    """Return the points on the lower convex hull; ``points`` save more and more."""
    hull: list[Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(point: Point, other: Point) -> float:
    return (other[1] - point[1]) / (other[0] - point[0])
