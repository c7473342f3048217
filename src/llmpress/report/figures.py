"""Plotly figures: numbers by layer, losses by block, bars of cost."""

import math
from collections.abc import Sequence

import pandas as pd

from llmpress.report.canvas import COLORS, SYMBOLS, Figure, add, array, new_figure, say, text
from llmpress.report.measures import LayerMeasure, significant


def layer_heatmap(layers: pd.DataFrame, measure: LayerMeasure) -> Figure:
    """Draw one number per layer of one run: decoder blocks across, kinds of linear layer down."""
    grid = _by_block(layers, measure.column)
    figure = new_figure("decoder block", "", height=150 + 30 * len(grid))
    low, high = float(layers[measure.column].min()), float(layers[measure.column].max())
    same = low == high
    ends = {"zmin": low - 0.5, "zmax": high + 0.5} if same else {}
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
        **ends,
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
    note = f"The same in all of these layers: {significant(low)}." if same else ""
    alt = f"Heat map of {measure.label.lower()} by decoder block and kind of layer."
    return say(figure, alt, note)


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
    by_run = {str(run): rows for run, rows in layers.sort_values("block").groupby("run")}
    for index, run in enumerate(runs):
        if run not in by_run:
            continue
        rows = by_run[run]
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
    figure["layout"]["xaxis"]["dtick"] = math.ceil(len(held_out) / 12)  # whole epochs
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


def _by_block(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return modules (in the model's order) by blocks, without layers outside of the blocks."""
    inside = layers[layers["block"] >= 0]
    grid = inside.pivot(index="module", columns="block", values=column)
    return grid.reindex(inside["module"].drop_duplicates())
