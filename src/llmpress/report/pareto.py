"""The Pareto front of the shown numbers: runs that no other run beats in both size and quality."""

from collections.abc import Sequence
from typing import Literal

Best = Literal["low", "high"]
Point = tuple[float, float]


SAME_SIZE = 1.01  # sizes no further apart than this, larger over smaller, count as the same


def dominated_by(points: Sequence[Point], best: tuple[Best, Best]) -> list[int | None]:
    """Return for every point the index of one that dominates it, None for those on the front.

    A point dominates another when it is as small, within 1 %, and better, or as good and smaller;
    of several, the one that is best in the second number is named.

    Args:
        points: Size and quality of each run; finite, sizes positive.
        best: Which end is good, of sizes and of qualities.
    """
    sizes = [size if best[0] == "low" else 1 / size for size, _ in points]
    losses = [_cost(quality, best[1]) for _, quality in points]
    ranked = sorted(range(len(points)), key=lambda index: (losses[index], sizes[index]))

    def dominates(index: int, other: int) -> bool:
        if losses[index] == losses[other]:
            return sizes[index] < sizes[other]
        return losses[index] < losses[other] and sizes[index] <= SAME_SIZE * sizes[other]

    return [
        next((other for other in ranked if dominates(other, index)), None)
        for index in range(len(points))
    ]


def front_corners(front: Sequence[Point], best: Best, ends: tuple[float, float]) -> list[Point]:
    """Return the corners of the front's steps, from the smallest run to the largest.

    At every size the line shows the best quality of a run at most as large as that, so it goes on
    to the end of the axis where runs may be larger.

    Args:
        front: Size and quality of the runs on the front, at least one.
        best: Which sizes are good.
        ends: Left and right end of the axis of sizes.
    """
    ordered = sorted(set(front), key=lambda place: _cost(place[0], best))
    corners: list[Point] = []
    for size, quality in ordered:
        if corners:
            corners.append((size, corners[-1][1]))
        corners.append((size, quality))
    return [*corners, (ends[1] if best == "low" else ends[0], corners[-1][1])]


def _cost(value: float, best: Best) -> float:
    return value if best == "low" else -value
