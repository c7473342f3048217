"""Figures of quality against size or cost: a point per run, the Pareto front, the originals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llmpress.report.canvas import COLORS, GREY, SYMBOLS, Figure, add, array, new_figure, say, text
from llmpress.report.comparison import FRONT, Pairs, Place, is_finite, places
from llmpress.report.grid import shown
from llmpress.report.groups import Group
from llmpress.report.measures import BROKEN, Measure, Row, shorten
from llmpress.report.pareto import Point, front_corners

WIDE = 3.0  # sizes as far apart as this, largest over smallest, get a logarithmic axis
REFERENCE_DASHES = ("dash", "dot")
MOST_NAMES = 10  # runs; where there are more, only some on the front are named
NAME_WIDTH = 0.2  # of the axis: names closer than this would cover each other
LONGEST_NAME = 28  # letters that are written in a plot
CROWDED = "Most names are left out: point at a run, or see the numbers below."


class Run(NamedTuple):
    """One run in a figure: its row, both numbers in the axes' units, and its place."""

    row: Row
    x: float
    y: float
    place: Place

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.row["name"])


def quality_figure(
    group: Group, size: Measure, measure: Measure, methods: Sequence[str], pairs: Pairs
) -> Figure:
    """Draw quality against size or cost: a point per run, a line per model it is measured against.

    Points are hollow where another run is as small and better, by more than chance.

    Args:
        group: What to draw.
        size: The horizontal axis.
        measure: The vertical axis.
        methods: All methods of the report, so that a method looks the same in every figure.
        pairs: What each number is the mean of.
    """
    if measure.is_distance:
        levels = {}  # a model agrees with itself: no line to compare with
    else:
        levels = {
            str(row["name"]): float(row[measure.column]) * measure.scale
            for row in group.references
            if is_finite(row, measure)
        }
    drawn, note = _drawable(group, size, measure, pairs)
    front = [run for run in drawn if not run.place.better]
    ends, log_size = _range([run.x for run in drawn])
    figure = new_figure(size.label, measure.title, log_y=measure.log, height=370)
    figure["layout"]["xaxis"] |= (
        {"type": "log", "tickformat": ".3~g", "range": [math.log10(end) for end in ends]}
        if log_size
        else {"range": list(ends)}
    )
    _add_references(figure, levels, ends, log=measure.log)
    _add_finetuning(figure, drawn)
    if front:
        corners = front_corners([(run.x, run.y) for run in front], size.best, ends)
        _add_line(figure, corners, name=FRONT, line={"color": GREY, "width": 3}, hoverinfo="skip")
    if len(drawn) > MOST_NAMES:
        note = f"{note} {CROWDED}".strip()
    sides = _sides(drawn, ends, measure, log=log_size)
    looks: dict[tuple[str, str, str], list[Run]] = {}
    for run in drawn:
        looks.setdefault(_style(run, methods), []).append(run)
    for look, runs in sorted(looks.items()):
        _add_runs(figure, runs, [sides.get(run.name) for run in runs], size, measure, look)
    alt = (
        f"Scatter plot of {len(drawn)} runs: {measure.title} against {size.label}; on the "
        f"{FRONT}: {', '.join(run.name for run in front) or 'none'}."
    )
    return say(figure, alt, note)


def _drawable(group: Group, size: Measure, measure: Measure, pairs: Pairs) -> tuple[list[Run], str]:
    """Return the runs that have a place on the axes, and a note on the others."""
    found = places(group.working, size, measure, pairs)
    drawn = [
        Run(row, x, y, found[str(row["name"])])
        for row in group.working
        if row["name"] in found
        and ((x := float(row[size.column]) * size.scale) > 0 or size.group != "Cost")
        and ((y := float(row[measure.column]) * measure.scale) > 0 or not measure.log)
    ]
    there = {run.name for run in drawn}
    absent = [str(row["name"]) for row in group.working if row["name"] not in there]
    notes = []
    if absent:
        reason = "no finite number" + (", or zero on a logarithmic axis" if measure.log else "")
        notes.append(f"Not drawn ({reason}): {', '.join(absent)}.")
    if group.broken:
        notes.append(f"Not drawn ({BROKEN}): {', '.join(sorted(group.broken))}.")
    return drawn, " ".join(notes)


def _sides(
    runs: Sequence[Run], ends: Point, measure: Measure, *, log: bool
) -> dict[str, str | None]:
    """Return where names stand: on the empty side of the front, or behind it.

    Of many runs only those on the front have names, as far as there is room.
    """
    low, high = (math.log(end) if log else end for end in ends)
    good, bad = ("bottom", "top") if measure.best == "low" else ("top", "bottom")
    found: dict[str, str | None] = {}
    last = -math.inf
    for run in sorted(runs, key=lambda run: run.x):
        along = ((math.log(run.x) if log else run.x) - low) / (high - low)
        if len(runs) > MOST_NAMES and (run.place.better or along - last < NAME_WIDTH):
            continue
        last = last if run.place.better else along
        found[run.name] = (
            f"{bad if run.place.better else good} {'right' if along < 0.5 else 'left'}"
        )
    return found


def _add_runs(
    figure: Figure,
    runs: Sequence[Run],
    sides: Sequence[str | None],
    size: Measure,
    measure: Measure,
    look: tuple[str, str, str],
) -> None:
    """Add the runs of one method, finetuned or not; names without a side are not written."""
    name, color, symbol = look
    errors = {}
    if measure.stderr:
        spread = array([float(run.row[measure.stderr]) * measure.scale for run in runs])
        errors = {"error_y": {"array": spread, "thickness": 1, "width": 3}}
    add(
        figure,
        "scatter",
        x=array([run.x for run in runs]),
        y=array([run.y for run in runs]),
        **errors,
        name=text(name),
        text=[
            text(shorten(run.name, LONGEST_NAME)) if side else ""
            for run, side in zip(runs, sides, strict=True)
        ],
        hovertext=[text(run.name) for run in runs],
        customdata=[text(run.place) for run in runs],
        mode="markers+text",
        textposition=[side or "middle right" for side in sides],
        cliponaxis=False,
        marker={
            "color": color,
            "symbol": [f"{symbol}-open" if run.place.is_behind else symbol for run in runs],
            "size": 15 if symbol == "star" else 11,
            "line": {"width": 2, "color": color},
        },
        hovertemplate=f"<b>%{{hovertext}}</b><br>%{{x:.4g}} {text(size.label)}"
        f"<br>%{{y:.4g}} {text(measure.title)}<br>%{{customdata}}<extra></extra>",
    )


def _add_line(figure: Figure, corners: Iterable[Point], **look: Any) -> None:
    x, y = zip(*corners, strict=True)
    add(figure, "scatter", x=array(x), y=array(y), mode="lines", **look)


def _add_references(figure: Figure, levels: Mapping[str, float], ends: Point, *, log: bool) -> None:
    """Add a horizontal line per model that the runs are measured against, with its name on it."""
    for index, (name, level) in enumerate(levels.items()):
        _add_line(
            figure,
            [(ends[0], level), (ends[1], level)],
            name=text(name),
            showlegend=False,
            line={"color": GREY, "width": 2, "dash": REFERENCE_DASHES[min(index, 1)]},
            hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
        )
        side = "right" if index % 2 == 0 else "left"  # neighbours stand at different ends
        figure["layout"].setdefault("annotations", []).append(
            {
                "text": text(shorten(name, LONGEST_NAME)),
                "showarrow": False,
                "xref": "paper",
                "x": int(side == "right"),
                "xanchor": side,
                "y": math.log10(level) if log else level,
                "yanchor": "bottom",
            }
        )


def _add_finetuning(figure: Figure, runs: Sequence[Run]) -> None:
    """Join every finetuned run with the run it was made from."""
    by_name = {run.name: run for run in runs}
    for after in runs:
        before = by_name.get(str(after.row["tuned_from"]))
        if before is not None:
            corners = [(before.x, before.y), (after.x, after.y)]
            line = {"color": GREY, "width": 1}
            _add_line(figure, corners, line=line, showlegend=False, hoverinfo="skip")


def _range(sizes: Sequence[float]) -> tuple[Point, bool]:
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


def _style(run: Run, methods: Sequence[str]) -> tuple[str, str, str]:
    """Return the name in the legend, the color and the symbol."""
    method = shown(run.row["method"], str)
    index = list(methods).index(method) if method in methods else len(methods)
    color, symbol = COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]
    tuned = run.row["kind"] in ("finetuned", "recovered")
    return (f"{method}, finetuned", color, "star") if tuned else (method, color, symbol)
