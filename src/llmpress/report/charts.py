"""Which charts the report holds: each is one place on the page with variants to choose from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmpress.report import figures
from llmpress.report.measures import SIZE_AXES, quality_measures


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


def quality_charts(summary: pd.DataFrame) -> dict[str, list[Chart]]:
    """Return the charts of quality against size, for weights and for deltas, one per original."""
    methods = sorted(summary["method"].dropna().unique())
    charts: dict[str, list[Chart]] = {"weights": [], "deltas": []}
    compressed = summary[summary["kind"] != "model"]
    models = summary[summary["kind"] == "model"]
    groups = compressed.groupby(
        [compressed["kind"] == "delta", compressed["original"].fillna("")], sort=True
    )
    for index, ((is_delta, original), runs) in enumerate(groups):
        references = models[models["name"].isin([original, *runs["base"].dropna()])]
        measures = [m for m in quality_measures(summary.columns) if runs[m.column].notna().any()]
        sizes = [size for size in SIZE_AXES if runs[size.column].notna().any()]
        variants = {
            f"{measure.column}|{size.column}": (
                figures.quality_figure(runs, references, size, measure, methods)
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
                "and padding included; dashed lines are uncompressed models, grey lines join a run "
                "before and after finetuning.",
                choices=[
                    Choice("Quality", options),
                    Choice("Size", {"": [(size.column, size.label) for size in sizes]}),
                ],
                variants=variants,
            )
        )
    return charts


def layer_charts(layers: pd.DataFrame) -> list[Chart]:
    """Return the heat map of one run's layers and the comparison of runs by block."""
    if layers.empty:
        return []
    measures = [m for m in figures.LAYER_MEASURES if layers[m.column].notna().any()]
    by_measure = Choice("Number", {"": [(m.column, m.label) for m in measures]})
    runs = list(layers["run"].drop_duplicates())
    modules = list(layers.loc[layers["block"] >= 0, "module"].drop_duplicates())
    heat, lines = {}, {}
    for measure in measures:
        known = layers[layers[measure.column].notna()]
        for run, rows in known.groupby("run"):
            if (rows["block"] >= 0).any():
                heat[f"{run}|{measure.column}"] = figures.layer_heatmap(rows, measure)
        for module, rows in known[known["block"] >= 0].groupby("module"):
            figure = figures.layer_lines(rows, runs, measure)
            lines[f"{module}|{measure.column}"] = figure
    return [
        Chart(
            key="layers-run",
            title="One run, all layers",
            caption="Error and size of every compressed linear layer of one run; the output error "
            "is that of the layer on calibration inputs, relative to the output's norm.",
            choices=[Choice("Run", _plain_options(runs)), by_measure],
            variants=heat,
        ),
        Chart(
            key="layers-kind",
            title="One kind of layer, all runs",
            caption="The same numbers for one kind of linear layer, one line per run.",
            choices=[Choice("Layer", _plain_options(modules)), by_measure],
            variants=lines,
        ),
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
    """Return the bars of time, memory and speed."""
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
            "Peak memory while compressing",
            "Largest memory of the compression process, in MB.",
            {"compress_peak_memory_bytes": "compress"},
            ("MB", 1e-6),
        ),
        (
            "cost-decode",
            "Speed of generation",
            "Tokens decoded per second by the model as stored, one sequence at a time.",
            {"decode_tokens_per_second": "decode"},
            ("tokens/s", 1.0),
        ),
        (
            "cost-run-memory",
            "Peak memory while generating",
            "Largest memory of the process that generates with the model, in MB.",
            {"peak_memory_bytes": "generate"},
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


def _plain_options(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    return {"": [(name, name) for name in names]}
