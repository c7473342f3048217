"""The page part of each run: what was done, its numbers in pairs, layers, blocks, samples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from llmpress.evaluation.uncertainty import Difference, with_error
from llmpress.report import allocation
from llmpress.report.comparison import Pairs
from llmpress.report.context import provenance
from llmpress.report.grid import Grid, shown
from llmpress.report.groups import Group
from llmpress.report.measures import (
    COSTS,
    LAYER_ERRORS,
    NO_VALUE,
    RECOVERY,
    SIZES,
    TRAINED,
    Measure,
    Row,
    decimals,
    significant,
)
from llmpress.report.tables import KIND_LABELS, Result, Results

_DONE = {
    "model": "As it is, not compressed.",
    "compressed": "The weights of {original}, compressed by {method}.",
    "finetuned": "{start}, compressed by {method}, finetuned block by block against {original}.",
    "recovered": "{start}, trained end to end on text.",
    "delta": "What fine-tuning made of {base}, compressed by {method}; compared with {original}.",
    "trained": "{start}, trained end to end on a task.",
    "peer": "The weights of {original}, compressed by another tool, {method}.",
}


class Part(NamedTuple):
    """What the page says of one run.

    Attributes:
        name: Its name.
        label: Its kind and method.
        done: A sentence on what was done.
        tables: Numbers, layers, finetuned blocks.
        samples: Prompt, the original's text, and the run's own.
        original: Name of the model it is compared with; None of a model itself.
        facts: Headed groups of settings and origins, the settings first.
    """

    name: str
    label: str
    done: str
    tables: Sequence[Grid]
    samples: Sequence[tuple[str, str | None, str]]
    original: str | None
    facts: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def parts(
    results: Results,
    groups: Sequence[Group],
    layers: pd.DataFrame,
    blocks: pd.DataFrame,
    pairs: Pairs,
) -> Iterator[Part]:
    """Yield the part of every model and run.

    Args:
        results: What `read_results` found.
        groups: What is compared with what.
        layers: Every layer of every run.
        blocks: Every finetuned block.
        pairs: What each number is the mean of.
    """
    rows = {str(row["name"]): (row, group) for group in groups for row in group.rows}
    for result in results.found:
        row, group = rows[result.name]
        tables = [
            _numbers(row, group, {name: rows[name][0] for name in rows}, pairs),
            _layers(layers[layers["run"] == result.name], result.name),
            _blocks(blocks[blocks["run"] == result.name], result.name),
        ]
        names = {
            "original": result.original or "an unknown model",
            "method": result.method or "an unknown method",
            "base": result.base or "its base",
            "start": result.tuned_from or "A run",
        }
        method = f", {result.method}" if result.method else ""
        yield Part(
            result.name,
            f"{KIND_LABELS[result.kind]}{method}",
            _DONE[result.kind].format(**names),
            [table for table in tables if table],
            list(_samples(result, results.get(result.original))),
            result.original,
            provenance(result),
        )


def _numbers(row: Row, group: Group, rows: Mapping[str, Row], pairs: Pairs) -> Grid:
    """Compare a run with its original and with what it was finetuned from, in pairs."""
    name = str(row["name"])
    others = [rows[o] for o in (row["original"], row["tuned_from"]) if o in rows and o != name]
    measures = group.measured([*SIZES, *group.qualities, RECOVERY, *TRAINED, *COSTS])
    headings = ["", name]
    for other in others:
        headings += [str(other["name"]), f"Difference from {other['name']}"]
    cells = []
    for measure in measures:
        texts = [measure.title, measure.text(row, group.original)]
        for other in others:
            texts.append(measure.text(other))
            difference = pairs.difference(str(other["name"]), name, measure.column)
            itself = other["kind"] == "model" and measure.is_distance
            texts.append(NO_VALUE if itself else _difference(difference, measure))
        cells.append(texts)
    caption = (
        "Differences are means over the same windows or items, ± one standard error; those of "
        "perplexity are of the loss, in nats."
        if others
        else "Numbers of the model itself."
    )
    return Grid(f"Numbers of {name}", caption, headings, cells)


def _difference(difference: Difference | None, measure: Measure) -> str:
    if difference is None or not difference.stderr > 0:
        return NO_VALUE
    both = with_error(difference.mean * measure.scale, difference.stderr * measure.scale, "+")
    return both if difference.is_distinguishable() else f"{both}, not told apart"


def _layers(layers: pd.DataFrame, name: str) -> Grid:
    """Sum up what each kind of layer was given, and its errors."""
    given = allocation.measures(layers)
    layers = allocation.with_allocation(layers)
    errors = [error for error in LAYER_ERRORS if layers[error.column].notna().any()]
    headings = ["Layers", "How many", "Shape", *(m.label for m in given)]
    for error in errors:
        headings += [error.label, "Worst, in block"]
    rows = []
    for module, same in layers.groupby("module", sort=False):
        shapes = dict.fromkeys(" × ".join(map(str, shape or ())) for shape in same["shape"])
        cells = [str(module), str(len(same)), ", ".join(shapes)]
        cells += [_span(same[measure.column]) for measure in given]
        for error in errors:
            known = same.loc[same[error.column].notna()].sort_values(error.column)
            cells.append(shown(known[error.column].mean(), significant))
            worst = known.tail(1)[[error.column, "block"]].to_numpy().tolist()
            cells += [f"{significant(value)} in {block:.0f}" for value, block in worst] or [
                NO_VALUE
            ]
        rows.append(cells)
    caption = (
        "What each kind of layer was given, least to most, and its mean and largest error: "
        "‖(W − Ŵ)x‖² ÷ ‖Wx‖² on the calibration text, ‖W − Ŵ‖² ÷ ‖W‖² of the weights."
    )
    return Grid(f"Layers of {name}", caption, headings, rows)


def _span(values: pd.Series) -> str:
    if values.isna().all():
        return NO_VALUE
    low, high = (f"{end:.4g}" for end in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _blocks(blocks: pd.DataFrame, name: str) -> Grid:
    rows = [
        [
            str(row["index"]),
            shown(row["loss_before"], significant),
            shown(row["loss_after"], significant),
            " → ".join(map(significant, row["train_loss"] or [])) or NO_VALUE,
            " → ".join(map(significant, row["validation_loss"] or [])) or NO_VALUE,
            "yes" if row["kept"] else "no",
            shown(row["seconds"], decimals(1)),
        ]
        for _, row in blocks.iterrows()
    ]
    caption = "Held-out loss of every block; where it did not fall, the block stayed as it was."
    headings = ["Block", "Loss before", "Loss after", "Training, by epoch", "Held out, by epoch"]
    headings += ["Kept", "Seconds"]
    return Grid(f"Finetuned blocks of {name}", caption, headings, rows)


def _samples(result: Result, original: Result | None) -> Iterator[tuple[str, str | None, str]]:
    """Yield prompt, the original's continuation, the run's."""
    written = {s["prompt"]: s["text"] for s in _texts(original)}
    for sample in _texts(result):
        yield sample["prompt"], written.get(sample["prompt"]), sample["text"]


def _texts(result: Result | None) -> Sequence[Mapping[str, Any]]:
    return (result.details.get("samples") or []) if result else []
