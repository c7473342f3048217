"""Which charts the report holds: each is one place on the page with variants to choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmpress.report import allocation, figures
from llmpress.report.measures import LAYER_ERRORS, SIZE_AXES, LayerMeasure, quality_measures
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


def quality_charts(
    summary: pd.DataFrame, pairs: Mapping[tuple[str, str], Sequence[float]]
) -> dict[str, list[Chart]]:
    """Return the charts of quality against size, for weights and for deltas, one per original.

    Args:
        summary: One row per model and run.
        pairs: What each number is the mean of, by run and column.
    """
    methods = sorted(summary["method"].dropna().unique())
    charts: dict[str, list[Chart]] = {"weights": [], "deltas": []}
    compressed = summary[~summary["kind"].isin(["model", "trained"])]
    models = summary[summary["kind"] == "model"]
    groups = compressed.groupby(
        [compressed["kind"] == "delta", compressed["original"].fillna("")], sort=True
    )
    for index, ((is_delta, original), runs) in enumerate(groups):
        related = [original, *runs["base"].dropna().drop_duplicates()]
        peers = [name for name in models["name"] if name not in related]
        names = [name for name in (*related, *peers) if name in set(models["name"])]
        references = models.set_index("name", drop=False).loc[names].to_dict("records")
        rows = runs.to_dict("records")
        measures = [m for m in quality_measures(summary.columns) if runs[m.column].notna().any()]
        sizes = [size for size in SIZE_AXES if runs[size.column].notna().any()]
        variants = {
            f"{measure.column}|{size.column}": (
                quality_figure(rows, references, size, measure, methods, pairs)
            )
            for measure in measures
            for size in sizes
        }
        options: dict[str, list[tuple[str, str]]] = {}
        for measure in _preferred(measures, "kl_" if is_delta else "perplexity_"):
            options.setdefault(measure.group, []).append((measure.column, measure.label))
        what = "compressed deltas" if is_delta else "compressed weights"
        bits = "the delta" if is_delta else "the compressed layers"
        charts["deltas" if is_delta else "weights"].append(
            Chart(
                key=f"quality-{index}",
                title=f"Runs compared with {original}" if original else "Runs of unknown origin",
                caption=f"Quality of the {what} against the true size of {bits}, codebooks, scales "
                "and padding included, with standard errors. The stepped line is the Pareto front. "
                "Hollow points lie behind it: another run is as small and better on the same "
                "windows or items, beyond chance (95 %). The dashed line is the "
                "original, dotted ones are other uncompressed models (perplexities compare only "
                "between models of one tokenizer); a thin line joins a run before and after "
                "finetuning.",
                choices=[
                    Choice("Quality", options),
                    Choice("Size", {"": [(size.column, size.label) for size in sizes]}),
                ],
                variants=variants,
            )
        )
    return charts


def layer_charts(layers: pd.DataFrame) -> dict[str, list[Chart]]:
    """Return the charts of the layers: maps of one run, and lines of one kind of layer."""
    inside = layers[layers["block"] >= 0]
    if inside.empty:
        return {"layer_maps": [], "layer_lines": []}
    all_given = allocation.measures(inside)
    inside = allocation.with_allocation(inside)
    errors = _measured(inside, LAYER_ERRORS)
    given = _measured(inside, all_given)
    runs = list(inside["run"].drop_duplicates())
    modules = list(inside["module"].drop_duplicates())
    return {
        "layer_maps": [
            *_heat_maps(
                "layers-run",
                "Errors of one run",
                "Error of every compressed linear layer: the squared distance of its outputs on "
                "the calibration text, or of its weights, over the square of the original's.",
                inside,
                errors,
            ),
            *_heat_maps(
                "layers-allocation",
                "What one run gave each layer",
                "Stored bits per weight, ranks, codebooks or kept weights of every linear layer; a "
                "layer left dense has 16 bits.",
                inside,
                given,
            ),
        ],
        "layer_lines": [
            *_rank_groups(inside),
            Chart(
                key="layers-kind",
                title="One kind of layer, all runs",
                caption="The same numbers for one kind of linear layer, one line per run.",
                choices=[
                    Choice("Layer", _plain_options(modules)),
                    Choice("Number", _grouped(errors, given[:2])),
                ],
                variants={
                    f"{module}|{measure.column}": figures.layer_lines(rows, runs, measure)
                    for measure in (*errors, *given[:2])
                    for module, rows in _known(inside, measure).groupby("module")
                },
            ),
        ],
    }


def _heat_maps(
    key: str,
    title: str,
    caption: str,
    layers: pd.DataFrame,
    measures: Sequence[LayerMeasure],
) -> list[Chart]:
    """Return a heat map per run and number; runs whose first number varies stand first."""
    if not measures:
        return []
    spread = layers.groupby("run", sort=False)[[m.column for m in measures]].nunique().max(axis=1)
    varied = [str(run) for run in spread.index if spread[run] > 1]
    runs = [*varied, *(str(run) for run in spread.index if str(run) not in varied)]
    variants = {
        f"{run}|{measure.column}": figures.layer_heatmap(rows, measure)
        for measure in measures
        for run, rows in _known(layers, measure).groupby("run")
    }
    shown = [run for run in runs if any(f"{run}|{m.column}" in variants for m in measures)]
    choices = [Choice("Run", _plain_options(shown)), Choice("Number", _grouped(measures))]
    return [Chart(key, title, caption, choices, variants)]


def _rank_groups(layers: pd.DataFrame) -> list[Chart]:
    """Return the stacked bars of layers that hold ranks at several precisions."""
    mixed = layers[[bool(allocation.parts(given)) for given in layers["allocation"]]]
    if mixed.empty:
        return []
    runs, modules = (list(mixed[column].drop_duplicates()) for column in ("run", "module"))
    return [
        Chart(
            key="layers-groups",
            title="Ranks by precision",
            caption="How many singular vectors each layer keeps at which number of bits; the "
            "leading vectors have the most.",
            choices=[Choice("Run", _plain_options(runs)), Choice("Layer", _plain_options(modules))],
            variants={
                f"{run}|{module}": allocation.parts_figure(rows)
                for (run, module), rows in mixed.groupby(["run", "module"])
            },
        )
    ]


def finetuning_charts(blocks: pd.DataFrame) -> list[Chart]:
    """Return the charts of blockwise finetuning."""
    if blocks.empty:
        return []
    runs = list(blocks["run"].drop_duplicates())
    before_after = {
        str(run): figures.block_losses_figure(rows.sort_values("index"))
        for run, rows in blocks.groupby("run")
    }
    curves = {
        f"{block['run']}|{block['index']}": figures.training_figure(block)
        for _, block in blocks.iterrows()
        if block["train_loss"]
    }
    indices = [str(index) for index in sorted(blocks["index"].unique())]
    return [
        Chart(
            key="finetuning-blocks",
            title="Before and after, block by block",
            caption="Held-out loss of every decoder block against the original model's block, "
            "before and after its finetuning, each on the outputs of the finished blocks below.",
            choices=[Choice("Run", _plain_options(runs))],
            variants=before_after,
        ),
        Chart(
            key="finetuning-curves",
            title="Training of one block",
            caption="Mean training loss and held-out loss of one block, epoch by epoch.",
            choices=[Choice("Run", _plain_options(runs)), Choice("Block", _plain_options(indices))],
            variants=curves,
        ),
    ]


def cost_charts(summary: pd.DataFrame) -> list[Chart]:
    """Return the bars of time and memory."""
    wanted = (
        (
            "cost-seconds",
            "Time",
            "Wall time of compression and of finetuning, in seconds.",
            {"compress_seconds": "compress", "finetune_seconds": "finetune"},
            ("seconds", 1.0),
        ),
        (
            "cost-memory",
            "Peak memory of compression",
            "Largest memory of compressing or, for finetuned runs, of finetuning, in MB.",
            {"compress_peak_memory_bytes": "compress", "finetune_peak_memory_bytes": "finetune"},
            ("MB", 1e-6),
        ),
    )
    return [
        Chart(key, title, caption, [], {"": figures.bars_figure(summary, columns, *axis)})
        for key, title, caption, columns, axis in wanted
        if (summary[list(columns)].fillna(0) > 0).any(axis=None)
    ]


def _preferred(measures: Sequence[Any], prefix: str) -> list[Any]:
    """Return the measures with those of the prefix first: the first option is what opens."""
    return sorted(measures, key=lambda measure: not measure.column.startswith(prefix))


def _measured(layers: pd.DataFrame, measures: Sequence[LayerMeasure]) -> list[LayerMeasure]:
    return [measure for measure in measures if layers[measure.column].notna().any()]


def _known(layers: pd.DataFrame, measure: LayerMeasure) -> pd.DataFrame:
    return layers[layers[measure.column].notna()]


def _grouped(*measures: Sequence[LayerMeasure]) -> dict[str, list[tuple[str, str]]]:
    return {"": [(measure.column, measure.label) for group in measures for measure in group]}


def _plain_options(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    return {"": [(name, name) for name in names]}
