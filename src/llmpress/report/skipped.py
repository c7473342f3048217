"""What was left out of existing results: dense layers, undone finetuning, missing numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from llmpress.core.records import DENSE
from llmpress.report.grid import Grid
from llmpress.report.measures import LAYER_ERRORS, significant
from llmpress.report.tables import Results

NAMED_LAYERS = 4
Skipped = tuple[str, str, str]  # run, what was left out of it, why


def skipped(
    results: Results, layers: pd.DataFrame, blocks: pd.DataFrame, params: Mapping[str, Any]
) -> Grid:
    """Return everything left out, by kind and then by run.

    Args:
        results: What `read_results` found.
        layers: Every layer of every run.
        blocks: Every finetuned block.
        params: Content of params.yaml.
    """
    rows = [
        *_dense_layers(results, layers),
        *_undone_blocks(blocks),
        *_undone_trainings(results),
        *_unmeasured_layers(results, layers),
        *_unmeasured_quality(results, params),
    ]
    caption = "Parts of existing results that were not done, and why"
    return Grid("Left out of a result", caption, ["Run", "Skipped", "Why"], rows)


def _dense_layers(results: Results, layers: pd.DataFrame) -> Iterator[Skipped]:
    for run, rows in layers.groupby("run", sort=False):
        dense = list(rows.loc[rows["kind"] == DENSE, "name"])
        if dense:
            result = results.get(str(run))
            more = len(dense) - NAMED_LAYERS
            yield (
                str(run),
                f"{len(dense)} of {len(rows)} layers left dense: {', '.join(dense[:NAMED_LAYERS])}"
                + (f" and {more} more" if more > 0 else ""),
                f"The plan of {(result and result.method) or 'its method'} gives them no share: "
                "the budget is met without them, or no allowed rank makes them smaller. They stay "
                "at 16 bits, which count in bits per weight.",
            )


def _undone_blocks(blocks: pd.DataFrame) -> Iterator[Skipped]:
    for run, rows in blocks[~blocks["kept"].astype(bool)].groupby("run", sort=False):
        undone = ", ".join(map(str, rows["index"]))
        what = (
            f"finetuning of {len(rows)} of {(blocks['run'] == run).sum()} blocks undone: {undone}"
        )
        yield str(run), what, "It did not lower the held-out loss."


def _undone_trainings(results: Results) -> Iterator[Skipped]:
    for result in results.found:
        record = result.details.get("training") or {}
        if record.get("best_step") == 0:
            best = min(loss for _, loss in record["held_out"][1:])
            yield (
                result.name,
                "end-to-end finetuning undone",
                f"It did not lower the held-out loss: {significant(record['loss_before'])} before, "
                f"{significant(best)} at best later.",
            )


def _unmeasured_layers(results: Results, layers: pd.DataFrame) -> Iterator[Skipped]:
    for run, rows in layers.groupby("run", sort=False):
        absent = [m.label.lower() for m in LAYER_ERRORS if rows[m.column].isna().all()]
        if absent:
            result = results.get(str(run))
            start = result.tuned_from if result else None
            yield (
                str(run),
                f"no {' and no '.join(absent)} of its layers",
                f"Not measured again after finetuning: see {start} and the losses of the blocks."
                if start
                else "It was compressed without calibration statistics.",
            )


def _unmeasured_quality(results: Results, params: Mapping[str, Any]) -> Iterator[Skipped]:
    wanted = params.get("evaluation") or {}
    for result in results.found:
        quality = result.metrics.get("quality") or {}
        for what, names, measured in (
            ("corpus", wanted.get("corpora") or (), quality.get("perplexity") or {}),
            ("task", wanted.get("tasks") or (), quality.get("tasks") or {}),
        ):
            absent = [name for name in names if name not in measured]
            if absent:
                yield (
                    result.name,
                    f"no number for {what} {', '.join(absent)}",
                    "It was evaluated before params.yaml asked for it.",
                )
