"""Which charts the report holds: each is one place on the page with variants to choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmpress.report import allocation, figures
from llmpress.report.comparison import Pairs
from llmpress.report.groups import Group
from llmpress.report.measures import COSTS, LAYER_ERRORS, SIZES, LayerMeasure
from llmpress.report.quality import quality_figure


@dataclass(frozen=True)
class Choice:
    """A select element: ``options`` are ``(value, label)``, in groups by heading ('' for none)."""

    label: str
    options: Mapping[str, Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class Chart:
    """One place on the page.

    Attributes:
        key: Its id on the page.
        title: Its heading.
        caption: One sentence on what is seen.
        choices: Select elements; their values joined by ``|`` name a variant.
        variants: Figures as plotly JSON objects.
    """

    key: str
    title: str
    caption: str
    choices: Sequence[Choice]
    variants: Mapping[str, Any]


def quality_chart(group: Group, methods: Sequence[str], pairs: Pairs) -> Chart | None:
    """Return the chart of quality against size or cost; None where nothing was measured.

    Args:
        group: Runs and what they are measured against.
        methods: All methods of the report.
        pairs: What each number is the mean of.
    """
    measures, axes = group.qualities, group.measured([*SIZES, *COSTS])
    if not group.runs or not measures or not axes:
        return None
    first = sorted(axes, key=lambda size: size.column != "model_bytes")
    options: dict[str, list[tuple[str, str]]] = {}
    for measure in measures:
        options.setdefault(measure.group, []).append((measure.column, measure.label))
    return Chart(
        key=f"quality-{group.key}",
        title=f"{group.title}: quality against size",
        caption="The stepped line is the Pareto front. Hollow points are behind it beyond chance "
        "(95 %, in pairs of windows or items); filled ones behind it are not told apart from it.",
        choices=[
            Choice("Quality", options),
            Choice("Against", {"": [(size.column, size.label) for size in first]}),
        ],
        variants={
            f"{measure.column}|{size.column}": quality_figure(group, size, measure, methods, pairs)
            for measure in measures
            for size in first
        },
    )


def layer_charts(layers: pd.DataFrame) -> list[Chart]:
    """Return the maps of the layers of one run: their errors, and what they were given."""
    inside = layers[layers["block"] >= 0]
    given = allocation.measures(inside)
    inside = allocation.with_allocation(inside)
    return [
        *_heat_maps(
            "layers-run",
            "Errors of one run",
            "Error of every compressed linear layer: the squared distance of its outputs on the "
            "calibration text, or of its weights, over the square of the original's.",
            inside,
            LAYER_ERRORS,
        ),
        *_heat_maps(
            "layers-allocation",
            "What one run gave each layer",
            "Stored bits per weight, ranks, codebooks or kept weights of every linear layer; a "
            "layer left dense has 16 bits.",
            inside,
            given,
        ),
    ]


def _heat_maps(
    key: str,
    title: str,
    caption: str,
    layers: pd.DataFrame,
    measures: Sequence[LayerMeasure],
) -> list[Chart]:
    """Return a heat map per run and number; runs whose first number varies stand first."""
    measures = [measure for measure in measures if layers[measure.column].notna().any()]
    if not measures:
        return []
    spread = layers.groupby("run", sort=False)[[m.column for m in measures]].nunique().max(axis=1)
    varied = [str(run) for run in spread.index if spread[run] > 1]
    runs = [*varied, *(str(run) for run in spread.index if str(run) not in varied)]
    variants = {
        f"{run}|{measure.column}": figures.layer_heatmap(rows, measure)
        for measure in measures
        for run, rows in layers[layers[measure.column].notna()].groupby("run")
    }
    shown = [run for run in runs if any(f"{run}|{m.column}" in variants for m in measures)]
    numbers = [(measure.column, measure.label) for measure in measures]
    choices = [Choice("Run", _plain_options(shown)), Choice("Number", {"": numbers})]
    return [Chart(key, title, caption, choices, variants)]


def finetuning_charts(blocks: pd.DataFrame) -> list[Chart]:
    """Return the charts of blockwise finetuning."""
    if blocks.empty:
        return []
    runs = list(blocks["run"].drop_duplicates())
    before_after = {
        str(run): figures.block_losses_figure(rows.sort_values("index"))
        for run, rows in blocks.groupby("run")
    }
    return [
        Chart(
            key="finetuning-blocks",
            title="Before and after, block by block",
            caption="Held-out loss of every decoder block against the original model's block, "
            "before and after its finetuning, each on the outputs of the finished blocks below.",
            choices=[Choice("Run", _plain_options(runs))],
            variants=before_after,
        )
    ]


def _plain_options(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    return {"": [(name, name) for name in names]}
