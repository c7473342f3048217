"""Plotly figures: quality against size, errors by layer, losses by block, bars of cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from llmpress.report.canvas import COLORS, GREY, SYMBOLS, Figure, add, array, new_figure, say, text
from llmpress.report.measures import Measure


@dataclass(frozen=True)
class LayerMeasure:
    """One number per layer: its column, its name, and whether its axis is logarithmic."""

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
) -> Figure:
    """Draw quality against true size: a point per run, a line per uncompressed model.

    Args:
        runs: Rows of the summary to draw.
        references: Rows of the models drawn as horizontal lines.
        size: The horizontal axis.
        measure: The vertical axis.
        methods: All methods of the report, so that a method looks the same in every figure.
    """
    scale = measure.scale
    drawable, note = _drawable(runs, references, size, measure)
    figure = new_figure(size.label, measure.title, log_y=measure.log, height=460)
    low, high = _range(drawable[size.column])
    figure["layout"]["xaxis"]["range"] = [low, high]
    turn = low + 0.7 * (high - low)  # labels of points further right stand on their left
    _add_references(figure, references, (low, high), measure)
    _add_finetuning(figure, drawable, size, measure)
    for (method, tuned), rows in drawable.groupby(
        [drawable["method"].fillna("unknown"), drawable["kind"] == "finetuned"]
    ):
        color, symbol = _style(str(method), methods)
        rows = rows.sort_values(size.column)
        errors = {}
        if measure.stderr:
            spread = array(rows[measure.stderr] * scale)
            errors = {"error_y": {"array": spread, "thickness": 1, "width": 3}}
        add(
            figure,
            "scatter",
            x=array(rows[size.column]),
            y=array(rows[measure.column] * scale),
            **errors,
            name=text(f"{method}, finetuned" if tuned else method),
            text=[f" {text(name)} " for name in rows["name"]],
            mode="markers+text",
            textposition=[
                "middle left" if right else "middle right" for right in rows[size.column] > turn
            ],
            cliponaxis=False,
            marker={
                "color": color,
                "symbol": "star" if tuned else symbol,
                "size": 15 if tuned else 11,
            },
            hovertemplate="<b>%{text}</b><br>%{x:.4g} "
            + text(size.label)
            + "<br>%{y:.4g} "
            + text(measure.title)
            + "<extra></extra>",
        )
    return say(
        figure,
        f"Scatter plot of {len(drawable)} runs: {measure.title} against {size.label}.",
        note,
    )


def layer_heatmap(layers: pd.DataFrame, measure: LayerMeasure) -> Figure:
    """Draw one number per layer of one run: decoder blocks across, kinds of linear layer down."""
    grid = _by_block(layers, measure.column)
    figure = new_figure("decoder block", "", height=150 + 30 * len(grid))
    add(
        figure,
        "heatmap",
        z=array(grid),
        x=array(grid.columns),
        y=[text(module) for module in grid.index],
        colorscale="Viridis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorbar={
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "thickness": 12,
            "title": {"text": measure.label, "side": "top"},
        },
        hovertemplate="%{y}, block %{x}: %{z:.4g}<extra></extra>",
    )
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    figure["layout"]["xaxis"]["showgrid"] = False
    return say(
        figure, f"Heat map of {measure.label.lower()} by decoder block and kind of layer.", ""
    )


def layer_lines(layers: pd.DataFrame, runs: Sequence[str], measure: LayerMeasure) -> Figure:
    """Draw one number per decoder block for one kind of linear layer, a line per run.

    Args:
        layers: Layers of this kind, of several runs.
        runs: All runs of the chart, so that a run looks the same for every kind of layer.
        measure: The vertical axis.
    """
    figure = new_figure(
        "decoder block", measure.label, log_y=measure.log, height=360 + 10 * len(runs)
    )
    for index, run in enumerate(runs):
        rows = layers[layers["run"] == run].sort_values("block")
        if rows.empty:
            continue
        add(
            figure,
            "scatter",
            x=array(rows["block"]),
            y=array(rows[measure.column]),
            name=text(run),
            mode="lines+markers",
            line={
                "color": COLORS[index % len(COLORS)],
                "width": 2,
                "dash": ("solid", "dash", "dot")[index // len(COLORS) % 3],
            },
            marker={"size": 5, "symbol": SYMBOLS[index % len(SYMBOLS)]},
            hovertemplate="block %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
    return say(figure, f"Lines of {measure.label.lower()} by decoder block, one per run.", "")


def block_losses_figure(blocks: pd.DataFrame) -> Figure:
    """Draw the loss of every finetuned block of one run before and after, and which were kept."""
    figure = new_figure("decoder block", "held-out loss of the block", log_y=True, height=380)
    for column, name, color in (
        ("loss_before", "before", COLORS[1]),
        ("loss_after", "after", COLORS[0]),
    ):
        add(
            figure,
            "scatter",
            x=array(blocks["index"]),
            y=array(blocks[column]),
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={
                "size": 7,
                "symbol": [
                    "x" if name == "after" and not kept else "circle" for kept in blocks["kept"]
                ],
            },
            hovertemplate="block %{x}: %{y:.4g}<extra>" + name + "</extra>",
        )
    undone = [str(block) for block in blocks.loc[~blocks["kept"].astype(bool), "index"]]
    note = f"Finetuning was not kept in blocks {', '.join(undone)} (crosses)." if undone else ""
    return say(figure, f"Loss of {len(blocks)} blocks before and after finetuning.", note)


def training_figure(block: pd.Series) -> Figure:
    """Draw the losses of one finetuned block by epoch; the held-out loss starts before training."""
    figure = new_figure("epoch", "loss", log_y=True, height=380)
    held_out = [block["loss_before"], *block["validation_loss"]]
    curves = (
        ("training", COLORS[1], range(1, len(block["train_loss"]) + 1), block["train_loss"]),
        ("held out", COLORS[0], range(len(held_out)), held_out),
    )
    for name, color, epochs, losses in curves:
        add(
            figure,
            "scatter",
            x=array(epochs),
            y=array(losses),
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 7},
            hovertemplate="epoch %{x}: %{y:.4g}<extra>" + name + "</extra>",
        )
    return say(figure, f"Training and held-out loss of block {block['index']} by epoch.", "")


def bars_figure(summary: pd.DataFrame, columns: dict[str, str], label: str, scale: float) -> Figure:
    """Draw horizontal bars of a cost or speed, one group per run.

    Args:
        summary: Rows to draw; rows without a positive number are left out.
        columns: Column of the summary -> name in the legend; bars of one run are stacked.
        label: The horizontal axis, with its unit.
        scale: What the numbers are multiplied with to come to that unit.
    """
    rows = summary[(summary[list(columns)].fillna(0) > 0).any(axis=1)].iloc[::-1]
    figure = new_figure(label, "", height=110 + 26 * len(rows))
    for index, (column, name) in enumerate(columns.items()):
        add(
            figure,
            "bar",
            x=array(rows[column].astype("float64") * scale),
            y=[text(run) for run in rows["name"]],
            orientation="h",
            name=name,
            marker={"color": COLORS[index]},
            hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>",
        )
    legend = len(columns) > 1
    figure["layout"] |= {"barmode": "stack", "showlegend": legend, "bargap": 0.3}
    figure["layout"]["yaxis"]["showgrid"] = False
    return say(figure, f"Bars of {label} for {len(rows)} models and runs.", "")


def _add_references(
    figure: Figure, references: pd.DataFrame, sizes: tuple[float, float], measure: Measure
) -> None:
    if measure.column.startswith(("kl_", "top1_")):
        return  # a model agrees with itself: no line to compare with
    for index, (_, row) in enumerate(references[_finite(references[measure.column])].iterrows()):
        value = row[measure.column] * measure.scale
        add(
            figure,
            "scatter",
            x=array(sizes),
            y=array([value, value]),
            mode="lines",
            name=text(row["name"]),
            line={"color": GREY, "width": 2, "dash": ("dash", "dot")[index % 2]},
            hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
        )


def _add_finetuning(figure: Figure, runs: pd.DataFrame, size: Measure, measure: Measure) -> None:
    """Join every finetuned run with the run it was made from."""
    before = runs.set_index("name")
    for _, after in runs[runs["tuned_from"].isin(before.index)].iterrows():
        start = before.loc[after["tuned_from"]]
        add(
            figure,
            "scatter",
            x=array([start[size.column], after[size.column]]),
            y=array([row[measure.column] * measure.scale for row in (start, after)]),
            mode="lines",
            line={"color": GREY, "width": 1.5},
            showlegend=False,
            hoverinfo="skip",
        )


def _range(sizes: pd.Series) -> tuple[float, float]:
    """Return the ends of the axis of sizes; sizes that are nearly equal stay close together."""
    low, high = (float(sizes.min()), float(sizes.max())) if len(sizes) else (0.0, 1.0)
    margin = max(0.05 * (high - low), 0.1 * high)
    return low - margin, high + margin


def _by_block(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return modules (in the model's order) by blocks, without layers outside of the blocks."""
    inside = layers[layers["block"] >= 0]
    grid = inside.pivot(index="module", columns="block", values=column)
    return grid.reindex(inside["module"].drop_duplicates())


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    index = list(methods).index(method) if method in methods else len(methods)
    return COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]


def _finite(values: pd.Series) -> pd.Series:
    numbers = values.astype("float64")
    return numbers.notna() & (numbers.abs() != math.inf)


def _drawable(
    runs: pd.DataFrame, references: pd.DataFrame, size: Measure, measure: Measure
) -> tuple[pd.DataFrame, str]:
    """Return the runs that have a place on the axes, and a note on the others."""
    drawn = runs[_finite(runs[size.column]) & _finite(runs[measure.column])]
    if measure.log:
        drawn = drawn[drawn[measure.column] > 0]
    absent = runs.loc[~runs["name"].isin(drawn["name"]), "name"]
    notes = []
    if len(absent):
        reason = "no finite number" + (", or zero on a logarithmic axis" if measure.log else "")
        notes.append(f"Not drawn ({reason}): {', '.join(absent)}.")
    least = min(drawn[measure.column].min(), references[measure.column].min())
    limit = measure.span * least if math.isfinite(measure.span) else math.inf
    far = drawn[drawn[measure.column] > limit]
    if len(far):
        values = (f"{row['name']} ({measure.text(row)})" for _, row in far.iterrows())
        notes.append(f"Far above the others, not drawn: {', '.join(values)}.")
        drawn = drawn.drop(far.index)
    return drawn, " ".join(notes)
