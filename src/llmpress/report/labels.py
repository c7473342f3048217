"""Where the names of points stand in a scatter plot, so that they cover each other little."""

from collections.abc import Sequence
from typing import NamedTuple

PLOT = (900, 340)  # pixels of a usual plot; narrow windows hide the names
LETTER, LINE, MARK = 6.6, 14, 16  # pixels: width of a letter, height of a name, size of a mark
MAX_COVERED = 0.3  # share of a name; one that would be covered more is not written
POSITIONS = {  # plotly's name -> shift of the name's left lower corner, in (widths, heights)
    "middle right": (0.0, -0.5),
    "middle left": (-1.0, -0.5),
    "top center": (-0.5, 0.6),
    "bottom center": (-0.5, -1.6),
    "top right": (0.0, 0.4),
    "bottom right": (0.0, -1.4),
    "top left": (-1.0, 0.4),
    "bottom left": (-1.0, -1.4),
}


class Box(NamedTuple):
    """A rectangle in pixels from the lower left corner of the plot."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def area(self) -> float:
        """Area in square pixels."""
        return (self.right - self.left) * (self.top - self.bottom)

    def shared(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def positions(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    lines: Sequence[tuple[float, float, float, float]] = (),
) -> list[str | None]:
    """Return plotly's ``textposition`` of every name; None where earlier names leave no room.

    Args:
        points: Places in the plot, both coordinates from 0 (left, bottom) to 1.
        names: The name of each.
        lines: What names should not lie on: ``(x, y, x, y)`` of both ends of lines along an axis.
    """
    width, height = PLOT
    taken = [_around(x * width, y * height) for x, y in points]  # by marks, then by names too
    strokes = [_stroke(*line) for line in lines]
    chosen: list[str | None] = []
    for (x, y), name in zip(points, names, strict=True):
        options = {
            position: _label(x * width, y * height, name, shift)
            for position, shift in POSITIONS.items()
        }
        covered = {
            position: _outside(box) + sum(box.shared(other) for other in taken)
            for position, box in options.items()
        }
        costs = {
            position: covered[position] + sum(box.shared(stroke) for stroke in strokes)
            for position, box in options.items()
        }
        best = min(costs, key=lambda position: round(costs[position]))
        room = covered[best] <= MAX_COVERED * options[best].area
        chosen.append(best if room else None)
        if room:
            taken.append(options[best])
    return chosen


def _label(x: float, y: float, name: str, shift: tuple[float, float]) -> Box:
    width = LETTER * len(name)
    gap = {0.0: MARK / 2, -1.0: -MARK / 2}.get(shift[0], 0.0)
    left, bottom = x + gap + shift[0] * width, y + shift[1] * LINE
    return Box(left, bottom, left + width, bottom + LINE)


def _around(x: float, y: float) -> Box:
    return Box(x - MARK / 2, y - MARK / 2, x + MARK / 2, y + MARK / 2)


def _stroke(x0: float, y0: float, x1: float, y1: float) -> Box:
    width, height = PLOT
    return Box(
        min(x0, x1) * width - 3,
        min(y0, y1) * height - 3,
        max(x0, x1) * width + 3,
        max(y0, y1) * height + 3,
    )


def _outside(box: Box) -> float:
    """Return the area that lies beside the plot: there it would be cut off."""
    inside = box.shared(Box(0, -LINE, PLOT[0], PLOT[1] + LINE))
    return 4 * (box.area - inside)
