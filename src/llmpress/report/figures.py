"""Plotly figures of the report. Colours of text and background are left to the page's style.

Every figure says in ``layout.meta`` what the page cannot know: ``alt``, a sentence for screen readers,
and ``note``, what is not drawn.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from llmpress.report.measures import Measure

# Readable on white and on near-black: at least 3:1 against both.
COLORS = ("#2f7de1", "#d9700a", "#0c9a6c", "#a65be8", "#e0405e", "#0891a5", "#a07d12", "#d3459b")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "x")
GREY = "#808080"
GRID = "rgba(128,128,128,0.25)"


@dataclass(frozen=True)
class LayerMeasure:
    """One number per layer: its column, what it is called, and whether it is drawn on a log axis."""

    column: str
    label: str
    log: bool


LAYER_MEASURES = (
    LayerMeasure("relative_output_error", "Relative output error", log=True),
    LayerMeasure("relative_weight_error", "Relative weight error", log=True),
    LayerMeasure("bits_per_weight", "Bits per weight", log=False),
)


def quality_figure(
    runs: pd.DataFrame,
    references: pd.DataFrame,
    size: Measure,
    measure: Measure,
    methods: Sequence[str],
) -> go.Figure:
    """Draw quality against true size: a point per run, a line per uncompressed model.

    Args:
        runs: Rows of the summary to draw.
        references: Rows of the models drawn as horizontal lines.
        size: The horizontal axis.
        measure: The vertical axis.
        methods: All methods of the report, so that a method looks the same in every figure.
    """
    scale = measure.scale
    drawable = runs[_finite(runs[size.column]) & _finite(runs[measure.column])]
    if measure.log:
        drawable = drawable[drawable[measure.column] > 0]
    figure = _figure(size.label, measure.title, log_y=measure.log, height=460)
    _add_references(figure, references, drawable[size.column], measure)
    _add_finetuning(figure, drawable, size, measure)
    for (method, tuned), rows in drawable.groupby(
        [drawable["method"].fillna("unknown"), drawable["kind"] == "finetuned"]
    ):
        color, symbol = _style(method, methods)
        rows = rows.sort_values(size.column)
        errors = rows[measure.stderr] * scale if measure.stderr else None
        figure.add_scatter(
            x=_array(rows[size.column]),
            y=_array(rows[measure.column] * scale),
            error_y={"array": _array(errors), "thickness": 1, "width": 3} if measure.stderr else None,
            name=_text(f"{method}, finetuned" if tuned else method),
            text=[_text(name) for name in rows["name"]],
            mode="markers+text",
            textposition=["top center", "bottom center"] * (len(rows) // 2) + ["top center"] * (len(rows) % 2),
            cliponaxis=False,
            marker={"color": color, "symbol": "star" if tuned else symbol, "size": 15 if tuned else 11},
            hovertemplate="<b>%{text}</b><br>%{x:.4g} " + _text(size.label) + "<br>%{y:.4g} "
            + _text(measure.title) + "<extra></extra>",
        )
    return _say(
        figure,
        f"Scatter plot of {len(drawable)} runs: {measure.title} against {size.label}.",
        _not_drawn(runs, drawable, zero=measure.log),
    )


def layer_heatmap(layers: pd.DataFrame, measure: LayerMeasure) -> go.Figure:
    """Draw one number per layer of one run: decoder blocks across, kinds of linear layer down."""
    grid = _by_block(layers, measure.column)
    figure = _figure("decoder block", "", height=150 + 30 * len(grid))
    figure.add_heatmap(
        z=_array(grid),
        x=_array(grid.columns),
        y=[_text(module) for module in grid.index],
        colorscale="Viridis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorbar={"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 12,
                  "title": {"text": measure.label, "side": "top"}},
        hovertemplate="%{y}, block %{x}: %{z:.4g}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    return _say(figure, f"Heat map of {measure.label.lower()} by decoder block and kind of layer.", "")


def layer_lines(layers: pd.DataFrame, runs: Sequence[str], measure: LayerMeasure) -> go.Figure:
    """Draw one number per decoder block for one kind of linear layer, a line per run.

    Args:
        layers: Layers of this kind, of several runs.
        runs: All runs of the chart, so that a run looks the same for every kind of layer.
        measure: The vertical axis.
    """
    figure = _figure("decoder block", measure.label, log_y=measure.log, height=420)
    for run, rows in layers.groupby("run"):
        rows = rows.sort_values("block")
        index = list(runs).index(run)
        figure.add_scatter(
            x=_array(rows["block"]),
            y=_array(rows[measure.column]),
            name=_text(run),
            mode="lines+markers",
            line={"color": COLORS[index % len(COLORS)], "width": 2,
                  "dash": ("solid", "dash", "dot")[index // len(COLORS) % 3]},
            marker={"size": 5, "symbol": SYMBOLS[index % len(SYMBOLS)]},
            hovertemplate="block %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
    return _say(figure, f"Lines of {measure.label.lower()} by decoder block, one per run.", "")


def block_losses_figure(blocks: pd.DataFrame) -> go.Figure:
    """Draw the loss of every finetuned block of one run before and after, and which were kept."""
    figure = _figure("decoder block", "held-out loss of the block", log_y=True, height=380)
    for column, name, color in (("loss_before", "before", COLORS[1]), ("loss_after", "after", COLORS[0])):
        figure.add_scatter(
            x=_array(blocks["index"]),
            y=_array(blocks[column]),
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 7, "symbol": [
                "x" if name == "after" and not kept else "circle" for kept in blocks["kept"]
            ]},
            hovertemplate="block %{x}: %{y:.4g}<extra>" + name + "</extra>",
        )
    undone = [str(block) for block in blocks.loc[~blocks["kept"].astype(bool), "index"]]
    note = f"Finetuning was not kept in blocks {', '.join(undone)} (crosses)." if undone else ""
    return _say(figure, f"Loss of {len(blocks)} blocks before and after finetuning.", note)


def training_figure(block: pd.Series) -> go.Figure:
    """Draw the losses of one finetuned block by epoch; the held-out loss starts before training."""
    figure = _figure("epoch", "loss", log_y=True, height=380)
    held_out = [block["loss_before"], *block["validation_loss"]]
    curves = (
        ("training", COLORS[1], range(1, len(block["train_loss"]) + 1), block["train_loss"]),
        ("held out", COLORS[0], range(len(held_out)), held_out),
    )
    for name, color, epochs, losses in curves:
        figure.add_scatter(
            x=_array(epochs),
            y=_array(losses),
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 7},
            hovertemplate="epoch %{x}: %{y:.4g}<extra>" + name + "</extra>",
        )
    return _say(figure, f"Training and held-out loss of block {block['index']} by epoch.", "")


def bars_figure(summary: pd.DataFrame, columns: dict[str, str], label: str, scale: float) -> go.Figure:
    """Draw horizontal bars of a cost or speed, one group per run.

    Args:
        summary: Rows to draw; rows without a positive number are left out.
        columns: Column of the summary -> name in the legend; bars of one run are stacked.
        label: The horizontal axis, with its unit.
        scale: What the numbers are multiplied with to come to that unit.
    """
    rows = summary[(summary[list(columns)].fillna(0) > 0).any(axis=1)].iloc[::-1]
    figure = _figure(label, "", height=110 + 26 * len(rows))
    for index, (column, name) in enumerate(columns.items()):
        figure.add_bar(
            x=_array(rows[column].astype("float64") * scale),
            y=[_text(run) for run in rows["name"]],
            orientation="h",
            name=name,
            marker={"color": COLORS[index]},
            hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>",
        )
    figure.update_layout(barmode="stack", showlegend=len(columns) > 1, bargap=0.3)
    figure.update_yaxes(showgrid=False)
    return _say(figure, f"Bars of {label} for {len(rows)} models and runs.", "")


def _figure(x: str, y: str, *, height: int, log_y: bool = False) -> go.Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "inherit", "size": 12, "color": GREY},
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
            "dragmode": False,
            "hovermode": "closest",
            "hoverlabel": {"bgcolor": "#1f2733", "bordercolor": "#1f2733", "font": {"color": "#fff"}},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
            "xaxis": {**axis, "title": {"text": _text(x)}},
            "yaxis": {**axis, "title": {"text": _text(y)}, **({"type": "log"} if log_y else {})},
        }
    )


def _add_references(
    figure: go.Figure, references: pd.DataFrame, sizes: pd.Series, measure: Measure
) -> None:
    if measure.column.startswith(("kl_", "top1_")):
        return  # a model agrees with itself: no line to compare with
    low, high = (sizes.min(), sizes.max()) if len(sizes) else (0, 1)
    margin = 0.05 * (high - low) or 0.5
    for index, (_, row) in enumerate(references[_finite(references[measure.column])].iterrows()):
        value = row[measure.column] * measure.scale
        figure.add_scatter(
            x=_array([low - margin, high + margin]),
            y=_array([value, value]),
            mode="lines",
            name=_text(row["name"]),
            line={"color": GREY, "width": 2, "dash": ("dash", "dot")[index % 2]},
            hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
        )


def _add_finetuning(figure: go.Figure, runs: pd.DataFrame, size: Measure, measure: Measure) -> None:
    """Join every finetuned run with the run it was made from."""
    before = runs.set_index("name")
    for _, after in runs[runs["tuned_from"].isin(before.index)].iterrows():
        start = before.loc[after["tuned_from"]]
        figure.add_scatter(
            x=_array([start[size.column], after[size.column]]),
            y=_array([row[measure.column] * measure.scale for row in (start, after)]),
            mode="lines",
            line={"color": GREY, "width": 1.5},
            showlegend=False,
            hoverinfo="skip",
        )


def _by_block(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return modules (in the model's order) by blocks; layers outside of the blocks are left out."""
    inside = layers[layers["block"] >= 0]
    grid = inside.pivot_table(index="module", columns="block", values=column, dropna=False)
    return grid.reindex(inside["module"].drop_duplicates())


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    index = list(methods).index(method) if method in methods else len(methods)
    return COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]


def _finite(values: pd.Series) -> pd.Series:
    numbers = values.astype("float64")
    return numbers.notna() & (numbers.abs() != math.inf)


def _not_drawn(runs: pd.DataFrame, drawn: pd.DataFrame, *, zero: bool) -> str:
    absent = [name for name in runs["name"] if name not in set(drawn["name"])]
    reason = "no finite number, or zero on a logarithmic axis" if zero else "no finite number"
    return f"Not drawn ({reason}): {', '.join(absent)}." if absent else ""


def _say(figure: go.Figure, alt: str, note: str) -> go.Figure:
    return figure.update_layout(meta={"alt": alt, "note": note})


def _text(text: Any) -> str:
    """Plotly reads tags in its texts; names are never tags."""
    return html.escape(str(text), quote=False)


def _array(values: Any) -> NDArray[np.float32]:
    """Return numbers for a trace: plotly stores them in a third of the bytes of decimal digits."""
    return np.asarray(values, dtype=np.float32)
