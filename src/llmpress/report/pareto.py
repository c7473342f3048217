"""The Pareto front of the shown numbers: runs that no other run beats in both size and quality."""

from collections.abc import Sequence
from typing import Literal

Best = Literal["low", "high"]
Place = tuple[float, float]


def dominated_by(points: Sequence[Place], best: tuple[Best, Best]) -> list[int | None]:
    """Return for every point the index of one that dominates it, None for those on the front.

    A point dominates another when it is at least as good in both numbers and better in one; of
    several, the one that is best in the second number is named.

    Args:
        points: Size and quality of each run; finite.
        best: Which end is good, of sizes and of qualities.
    """
    turned = [tuple(_cost(value, end) for value, end in zip(p, best, strict=True)) for p in points]
    found: list[int | None] = []
    for own in turned:
        better = [
            index
            for index, (size, loss) in enumerate(turned)
            if size <= own[0] and loss <= own[1] and (size, loss) != own
        ]
        found.append(min(better, key=lambda index: turned[index][::-1], default=None))
    return found


def front_corners(front: Sequence[Place], best: Best, ends: tuple[float, float]) -> list[Place]:
    """Return the corners of the front's steps, from the smallest run to the largest.

    At every size the line shows the best quality of a run at most as large as that, so it goes on
    to the end of the axis where runs may be larger.

    Args:
        front: Size and quality of the runs on the front, at least one.
        best: Which sizes are good.
        ends: Left and right end of the axis of sizes.
    """
    ordered = sorted(set(front), key=lambda place: _cost(place[0], best))
    corners: list[Place] = []
    for size, quality in ordered:
        if corners:
            corners.append((size, corners[-1][1]))
        corners.append((size, quality))
    return [*corners, (ends[1] if best == "low" else ends[0], corners[-1][1])]


def _cost(value: float, best: Best) -> float:
    return value if best == "low" else -value
