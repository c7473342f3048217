"""Plotly figures: numbers by layer, losses by block."""

import pandas as pd

from llmpress.report.canvas import COLORS, Figure, add, array, new_figure, say, text
from llmpress.report.measures import LayerMeasure, significant


def layer_heatmap(layers: pd.DataFrame, measure: LayerMeasure) -> Figure:
    """Draw one number per layer of one run: decoder blocks across, kinds of linear layer down."""
    grid = layers.pivot(index="module", columns="block", values=measure.column)
    grid = grid.reindex(layers["module"].drop_duplicates())  # in the model's order
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
