"""Figures of quality against true size: a point per run, the Pareto front, uncompressed models."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pandas as pd

from llmpress.evaluation.uncertainty import distinguishable
from llmpress.report.canvas import COLORS, GREY, SYMBOLS, Figure, add, array, new_figure, say, text
from llmpress.report.labels import positions
from llmpress.report.measures import Measure
from llmpress.report.pareto import Place, dominated_by, front_corners

FRONT = "Pareto front"
CROWDED = "Names are left out where points crowd: point at them, or see the numbers below."
WIDE = 3.0  # sizes as far apart as this, largest over smallest, get a logarithmic axis
REFERENCE_DASHES = ("dash", "dot", "dashdot")
Row = Mapping[Hashable, Any]  # of the summary


@dataclass(frozen=True)
class Point:
    """One run in a figure.

    Attributes:
        row: Its row of the summary.
        x: Size, in the axis' unit.
        y: Quality, in the axis' unit.
        better: Name of a run that dominates it; empty on the front.
        apart: Whether the two are told apart on the same windows or items.
    """

    row: Row
    x: float
    y: float
    better: str = ""
    apart: bool = True

    @property
    def rank(self) -> str:
        """What is known of its place, in words."""
        if not self.better:
            return f"on the {FRONT}"
        return f"{'not as good as' if self.apart else 'not told apart from'} {self.better}"

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.row["name"])


def quality_figure(
    runs: Sequence[Row],
    references: Sequence[Row],
    size: Measure,
    measure: Measure,
    methods: Sequence[str],
    pairs: Mapping[tuple[str, str], Sequence[float]],
) -> Figure:
    """Draw quality against true size: a point per run, a line per uncompressed model.

    Points are hollow where another run is as small and better, by more than chance.

    Args:
        runs: Rows of the summary to draw.
        references: Rows of the models drawn as horizontal lines, the original first.
        size: The horizontal axis.
        measure: The vertical axis.
        methods: All methods of the report, so that a method looks the same in every figure.
        pairs: What each number is the mean of, by run and column.
    """
    if measure.column.startswith(("kl_", "top1_")):
        references = ()  # a model agrees with itself: no line to compare with
    levels = [
        (str(row["name"]), float(row[measure.column]) * measure.scale)
        for row in references
        if _is_finite(row[measure.column])
    ]
    known = _points(runs, size, measure, pairs)
    drawn, note = _drawable(runs, known, [level for _, level in levels], measure)
    front = [point for point in drawn if not point.better]
    ends, log_size = _range([point.x for point in drawn])
    corners = front_corners([(p.x, p.y) for p in front], size.best, ends) if front else []
    figure = new_figure(size.label, measure.title, log_y=measure.log, height=460)
    figure["layout"]["xaxis"] |= (
        {
            "type": "log",
            "tickformat": ".3~g",
            "range": [math.log10(end) for end in ends],
        }
        if log_size
        else {"range": list(ends)}
    )
    _add_references(figure, levels, ends, log=measure.log)
    _add_finetuning(figure, drawn)
    if corners:
        _add_line(figure, corners, name=FRONT, line={"color": GREY, "width": 3}, hoverinfo="skip")
    heights = [level for _, level in levels]
    places = _places(drawn, heights, corners, ends, (log_size, measure.log))
    if None in places.values():
        note = f"{note} {CROWDED}".strip()
    looks: dict[tuple[str, bool], list[Point]] = {}
    for point in sorted(drawn, key=lambda point: (_method(point), _tuned(point), point.x)):
        looks.setdefault((_method(point), _tuned(point)), []).append(point)
    for look, points in looks.items():
        _add_points(figure, points, [places[p.name] for p in points], size, measure, look, methods)
    alt = (
        f"Scatter plot of {len(drawn)} runs: {measure.title} against {size.label}; on the "
        f"{FRONT}: {', '.join(point.name for point in front) or 'none'}."
    )
    return say(figure, alt, note)


def _points(
    runs: Sequence[Row],
    size: Measure,
    measure: Measure,
    pairs: Mapping[tuple[str, str], Sequence[float]],
) -> list[Point]:
    """Return the runs with both numbers, each with a run that dominates it."""
    points = [
        Point(row, float(row[size.column]) * size.scale, float(row[measure.column]) * measure.scale)
        for row in runs
        if _is_finite(row[size.column]) and _is_finite(row[measure.column])
    ]
    better = dominated_by([(point.x, point.y) for point in points], (size.best, measure.best))

    def apart(name: str, other: str) -> bool:
        first, second = (pairs.get((run, measure.column)) for run in (name, other))
        if not first or not second or len(first) != len(second):
            return True  # nothing to compare but the numbers
        return distinguishable(first, second)

    return [
        point
        if index is None
        else replace(point, better=points[index].name, apart=apart(point.name, points[index].name))
        for point, index in zip(points, better, strict=True)
    ]


def _drawable(
    runs: Sequence[Row], known: Sequence[Point], levels: Sequence[float], measure: Measure
) -> tuple[list[Point], str]:
    """Return the points that have a place on the axes, and a note on the other runs."""
    drawn = [point for point in known if point.y > 0 or not measure.log]
    names = {point.name for point in drawn}
    absent = [str(row["name"]) for row in runs if row["name"] not in names]
    notes = []
    if absent:
        reason = "no finite number" + (", or zero on a logarithmic axis" if measure.log else "")
        notes.append(f"Not drawn ({reason}): {', '.join(absent)}.")
    least = min([*(point.y for point in drawn), *levels], default=0.0)
    limit = measure.span * least if math.isfinite(measure.span) else math.inf
    far = [f"{point.name} ({measure.text(point.row)})" for point in drawn if point.y > limit]
    if far:
        notes.append(f"Far above the others, not drawn: {', '.join(far)}.")
    return [point for point in drawn if point.y <= limit], " ".join(notes)


def _add_points(
    figure: Figure,
    points: Sequence[Point],
    places: Sequence[str | None],
    size: Measure,
    measure: Measure,
    look: tuple[str, bool],
    methods: Sequence[str],
) -> None:
    """Add the runs of one method, finetuned or not; ``places`` are those of their names."""
    name, color, symbol = _style(*look, methods)
    errors = {}
    if measure.stderr:
        spread = array([float(point.row[measure.stderr]) * measure.scale for point in points])
        errors = {"error_y": {"array": spread, "thickness": 1, "width": 3}}
    add(
        figure,
        "scatter",
        x=array([point.x for point in points]),
        y=array([point.y for point in points]),
        **errors,
        name=text(name),
        text=[
            f" {text(point.name)} " if place else ""
            for point, place in zip(points, places, strict=True)
        ],
        hovertext=[text(point.name) for point in points],
        customdata=[text(point.rank) for point in points],
        mode="markers+text",
        textposition=[place or "middle right" for place in places],
        cliponaxis=False,
        marker={
            "color": color,
            "symbol": [
                f"{symbol}-open" if point.better and point.apart else symbol for point in points
            ],
            "size": 15 if symbol == "star" else 11,
            "line": {"width": 2, "color": color},
        },
        hovertemplate=f"<b>%{{hovertext}}</b><br>%{{x:.4g}} {text(size.label)}"
        f"<br>%{{y:.4g}} {text(measure.title)}<br>%{{customdata}}<extra></extra>",
    )


def _add_line(figure: Figure, corners: Iterable[Place], **look: Any) -> None:
    x, y = zip(*corners, strict=True)
    add(figure, "scatter", x=array(x), y=array(y), mode="lines", **look)


def _add_references(
    figure: Figure, levels: Sequence[tuple[str, float]], ends: Place, *, log: bool
) -> None:
    """Add a horizontal line per uncompressed model, with its name on it."""
    labels = []
    for index, (name, level) in enumerate(levels):
        _add_line(
            figure,
            [(ends[0], level), (ends[1], level)],
            name=text(name),
            showlegend=False,
            line={"color": GREY, "width": 2, "dash": REFERENCE_DASHES[min(index, 2)]},
            hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
        )
        right = index % 2 == 0  # names of neighbours stand at different ends
        labels.append(
            {
                "text": text(name),
                "showarrow": False,
                "xref": "paper",
                "x": 1 if right else 0,
                "xanchor": "right" if right else "left",
                "y": math.log10(level) if log else level,
                "yanchor": "bottom",
            }
        )
    if labels:
        figure["layout"]["annotations"] = labels


def _add_finetuning(figure: Figure, points: Sequence[Point]) -> None:
    """Join every finetuned run with the run it was made from."""
    by_name = {point.name: point for point in points}
    for after in points:
        before = by_name.get(after.row["tuned_from"])
        if before is not None:
            corners = [(before.x, before.y), (after.x, after.y)]
            line = {"color": GREY, "width": 1}
            _add_line(figure, corners, line=line, showlegend=False, hoverinfo="skip")


def _places(
    points: Sequence[Point],
    levels: Sequence[float],
    corners: Sequence[Place],
    ends: Place,
    logs: tuple[bool, bool],
) -> dict[str, str | None]:
    """Return where each run's name stands beside its point; those on the front choose first.

    Args:
        points: The drawn runs.
        levels: Heights of the horizontal lines.
        corners: Of the front.
        ends: Of the axis of sizes.
        logs: Which axes are logarithmic.
    """
    if not points:
        return {}
    points = sorted(points, key=lambda point: bool(point.better))
    places = [(point.x, point.y) for point in points]
    heights = [_along(y, log=logs[1]) for y in (*(y for _, y in places), *levels)]
    low, high = min(heights), max(heights)
    left, right = (_along(end, log=logs[0]) for end in ends)

    def relative(place: Place) -> Place:
        x, y = (_along(value, log=log) for value, log in zip(place, logs, strict=True))
        height = 0.05 + 0.9 * (y - low) / (high - low) if high > low else 0.5
        return (x - left) / (right - left), height

    lines = [(*relative((ends[0], level)), *relative((ends[1], level))) for level in levels]
    lines += [(*relative(start), *relative(end)) for start, end in pairwise(corners)]
    names = [point.name for point in points]
    chosen = positions([relative(place) for place in places], names, lines)
    return dict(zip(names, chosen, strict=True))


def _along(value: float, *, log: bool) -> float:
    return math.log10(value) if log else value


def _range(sizes: Sequence[float]) -> tuple[Place, bool]:
    """Return the ends of the axis of sizes and whether it is logarithmic.

    Sizes far apart are, so that one large run does not press the others together; sizes that are
    nearly equal stay close together.
    """
    low, high = (min(sizes), max(sizes)) if sizes else (0.0, 1.0)
    if low > 0 and high / low >= WIDE:
        margin = (high / low) ** 0.07
        return (low / margin, high * margin), True
    space = max(0.05 * (high - low), 0.1 * high)
    return (low - space, high + space), False


def _style(method: str, tuned: bool, methods: Sequence[str]) -> tuple[str, str, str]:
    """Return the name in the legend, the color and the symbol."""
    index = list(methods).index(method) if method in methods else len(methods)
    color, symbol = COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]
    return (f"{method}, finetuned", color, "star") if tuned else (method, color, symbol)


def _method(point: Point) -> str:
    method = point.row["method"]
    return "unknown" if pd.isna(method) else str(method)


def _tuned(point: Point) -> bool:
    return point.row["kind"] in ("finetuned", "recovered")


def _is_finite(value: Any) -> bool:
    return not pd.isna(value) and math.isfinite(value)
