"""Results on disk -> records and pandas frames; nothing is computed but sums, means and ratios.

One result is a metrics file and a details file of the same name. Names in params.yaml without a
metrics file are missing; metrics files that params.yaml does not name are left out, and both are
said. Without a params.yaml every metrics file is a result, and its details say what it is.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError

from llmpress.core.artifacts import read_json
from llmpress.core.errors import ArtifactError
from llmpress.core.kinds import KINDS, Kind
from llmpress.core.records import BlockRecord, Records, parse_records
from llmpress.core.settings import problem
from llmpress.evaluation.metrics import Details, Metrics

RECOVERED = "recovered"
"""Kind of what was trained on text; what was trained on a task is ``trained``."""
KIND_LABELS = {kind.name: kind.label for kind in KINDS} | {RECOVERED: "weights, recovered on text"}
KIND_ORDER = ("model", "compressed", "finetuned", RECOVERED, "peer", "delta", "trained")
SIZE_COLUMNS = (
    "bits_per_weight",
    "compressed_weights",
    "stored_bits",
    "model_weights",
    "model_bytes",
    "ratio",
)
COST_COLUMNS = (
    "compress_seconds",
    "compress_peak_memory_bytes",
    "finetune_seconds",
    "finetune_peak_memory_bytes",
)
QUALITIES = ("kl", "perplexity", "top1_agreement", "accuracy")  # prefixes of columns
MEANS = ("mean_kl", "mean_top1_agreement", "mean_accuracy")
TRAINED_COLUMNS = ("trainable_parameters", "trainable_share")
MADE_COLUMNS = ("make_seconds", "make_peak_memory_bytes")  # both steps together
INTEGER_SUFFIXES = ("_weights", "_bits", "_bytes")
CORPUS_METRICS = {  # key in the metrics file -> prefix of the column
    "perplexity": "perplexity",
    "kl_divergence_nats": "kl",
    "top1_agreement": "top1_agreement",
    "perplexity_stderr": "stderr_perplexity",
    "kl_divergence_stderr_nats": "stderr_kl",
    "top1_agreement_stderr": "stderr_top1_agreement",
}


@dataclass(frozen=True)
class Result:
    """What is known of one model or run.

    Attributes:
        name: Its name in params.yaml.
        kind: ``model``, ``compressed``, ``finetuned`` or ``delta``; ``recovered`` and ``trained``
            are finetuned end to end, on text and on a task.
        original: Name of the model it is compared with; None for a model itself.
        base: Delta runs: name of the base model.
        tuned_from: Of what was finetuned: name of the run before.
        metrics: Content of the metrics file.
        details: Content of the details file; empty when there is none.
    """

    name: str
    kind: str
    original: str | None
    base: str | None
    tuned_from: str | None
    metrics: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """Name of the method; None for an uncompressed model."""
        return self.details.get("method")

    @cached_property
    def records(self) -> Records | None:
        """What is recorded of each layer and block; None when nothing is.

        Raises:
            ArtifactError: They are damaged.
        """
        content = self.details.get("layers")
        return parse_records(content, f"details of {self.name}") if content else None


@dataclass(frozen=True)
class Results:
    """All results, and what keeps them from being complete.

    Attributes:
        found: Results in the order of `KIND_ORDER`, then of params.yaml.
        missing: Name -> why there is no result.
        remarks: Further sentences a reader must see, such as a missing details file.
        speed: Content of results/speed.json; empty when there is none.
    """

    found: tuple[Result, ...]
    missing: Mapping[str, str]
    remarks: tuple[str, ...]
    speed: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str | None) -> Result | None:
        """Return the result of that name, None when there is none."""
        return next((result for result in self.found if result.name == name), None)


def read_results(
    metrics: Path, details: Path, params: Mapping[str, Any] | None = None, speed: Path | None = None
) -> Results:
    """Read every result that params.yaml names, or all there are.

    Args:
        metrics: Folder of ``<name>.json`` with numbers.
        details: Folder of ``<name>.json`` with settings, layers, provenance and samples.
        params: Content of params.yaml; None for all results there are.
        speed: The file of the stage ``speed``; may be absent.

    Raises:
        ArtifactError: A file is damaged; a missing one is a gap in the report, not an error.
    """
    there = sorted(path.stem for path in metrics.glob("*.json"))
    records = {
        name: _checked(details / f"{name}.json", Details)
        for name in there
        if (details / f"{name}.json").is_file()
    }
    named = _named(params) if params is not None else _told(there, records)
    found = []
    for name in (name for name in named if name in there):
        numbers = _checked(metrics / f"{name}.json", Metrics)
        found.append(_result(name, *named[name], numbers, records.get(name, {})))
    missing = {
        name: f"There is no {name}.json: its evaluation has not run or has failed."
        for name in named
        if name not in there
    }
    remarks = [
        f"{result.name} has no details file: settings, layers and samples are missing."
        for result in found
        if not result.details
    ]
    strangers = [name for name in there if name not in named]
    if strangers:
        remarks.append(f"Left out, as params.yaml no longer names them: {', '.join(strangers)}.")
    found.sort(key=lambda result: KIND_ORDER.index(result.kind))
    timed = _mapping(speed) if speed and speed.is_file() else {}
    return Results(tuple(found), missing, tuple(remarks), timed)


def summary_frame(results: Results) -> pd.DataFrame:
    """Return one row per result; columns for absent numbers are NaN or NA.

    `mean_accuracy` is the mean over the result's tasks; `recovery` is its ratio to the original's
    and is given only when both were measured on the same items of the same tasks.
    """
    rows = [_row(result) for result in results.found]
    accuracy = {row["name"]: (row["mean_accuracy"], _items(row)) for row in rows}
    for row in rows:
        reference, items = accuracy.get(row["original"], (None, None))
        if reference and row["mean_accuracy"] is not None and items == _items(row):
            row["recovery"] = row["mean_accuracy"] / reference
    frame = pd.DataFrame(rows, columns=_columns(rows))
    for column in frame.columns:
        if column.endswith(INTEGER_SUFFIXES) or column.startswith("num_items_"):
            frame[column] = pd.to_numeric(frame[column]).astype("Int64")
        elif column not in TEXT_COLUMNS:
            frame[column] = pd.to_numeric(frame[column]).astype("float64")
    return frame


def layers_frame(results: Results) -> pd.DataFrame:
    """Return one row per compressed linear layer of every run, those trained end to end apart.

    `block` is the index of the decoder block, -1 for a layer outside of the blocks; `module` is the
    rest of the layer's name.
    """
    rows = []
    for result in results.found:
        if result.kind in ("recovered", "trained"):
            continue  # its layers are as large as those of the run it started from
        for layer in result.records.layers if result.records else ():
            block, module = split_layer_name(layer.name)
            rows.append({"run": result.name, "block": block, "module": module, **vars(layer)})
    frame = pd.DataFrame(rows, columns=LAYER_COLUMNS)
    frame[list(LAYER_NUMBERS)] = frame[list(LAYER_NUMBERS)].astype("float64")
    return frame


def blocks_frame(results: Results) -> pd.DataFrame:
    """Return one row per finetuned decoder block; the two curves stay lists."""
    rows = [
        {"run": result.name, **vars(block)}
        for result in results.found
        if result.records
        for block in result.records.blocks or ()
    ]
    return pd.DataFrame(rows, columns=BLOCK_COLUMNS)


def split_layer_name(name: str) -> tuple[int, str]:
    """Split ``model.layers.3.self_attn.q_proj`` into its block index 3 and ``self_attn.q_proj``."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (-1, name)


TEXT_COLUMNS = ("name", "kind", "method", "original", "base", "tuned_from")
LAYER_NUMBERS = (
    "bits_per_weight",
    "relative_weight_error",
    "relative_output_error",
    "seconds",
)
LAYER_COLUMNS = ["run", "name", "block", "module", "kind", "shape", "allocation", *LAYER_NUMBERS]
BLOCK_COLUMNS = ["run", *(field.name for field in fields(BlockRecord))]


def _named(params: Mapping[str, Any]) -> dict[str, tuple[Kind, Mapping[str, Any]]]:
    """Return name -> (kind, what params.yaml says of it) for everything that is evaluated."""
    shown = sorted(KINDS, key=lambda kind: KIND_ORDER.index(kind.name))
    return {
        name: (kind, settings) for kind in shown for name, settings in kind.entries(params).items()
    }


def _told(
    names: Sequence[str], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Kind, Mapping[str, Any]]]:
    """Return name -> (kind, nothing) as the details say; without them it is a compressed model."""
    kinds: dict[str, Kind] = {kind.name: kind for kind in KINDS}
    unknown = kinds["compressed"]
    told = {name: str(records.get(name, {}).get("kind")) for name in names}
    return {name: (kinds.get(kind, unknown), {}) for name, kind in told.items()}


def _result(
    name: str,
    kind: Kind,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Result:
    """Put together what is known of one result."""
    original = details.get("original") or settings.get(kind.original or "")
    made_with = details.get("settings") or {}
    return Result(
        name=name,
        kind=RECOVERED if kind.name == "trained" and settings.get("corpora") else kind.name,
        original=original if kind.original else None,
        base=details.get("base") or _below_data({**made_with, **settings}, "base"),
        tuned_from=_below_data(settings, kind.start or ""),
        metrics=metrics,
        details=details,
    )


def _below_data(settings: Mapping[str, Any], key: str) -> str | None:
    """Return the name of a folder below data/, such as ``compressed/NAME``, that settings give."""
    return str(settings[key]).rpartition("/")[2] if key in settings else None


def _mapping(path: Path) -> Mapping[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: must hold a JSON object; evaluate {path.stem} again")
    return value


def _checked(path: Path, form: type[BaseModel]) -> Mapping[str, Any]:
    value = _mapping(path)
    try:
        form.model_validate(value)
    except ValidationError as error:
        what = problem(error.errors()[0], form.__name__.lower())
        raise ArtifactError(f"{path}: {what}; evaluate {path.stem} again") from None
    return value


def _row(result: Result) -> dict[str, Any]:
    metrics = result.metrics
    quality = metrics.get("quality") or {}
    row: dict[str, Any] = {column: getattr(result, column) for column in TEXT_COLUMNS}
    for section, columns in (
        ("size", SIZE_COLUMNS),
        ("cost", COST_COLUMNS),
    ):
        values = metrics.get(section) or {}
        row |= {column: values.get(column) for column in columns}
    for key, prefix in CORPUS_METRICS.items():
        row |= {f"{prefix}_{corpus}": v for corpus, v in (quality.get(key) or {}).items()}
    tasks = quality.get("tasks") or {}
    for task, scores in tasks.items():
        for key in ("accuracy", "stderr", "num_items"):
            row[f"{key}_{task}"] = scores.get(key)
    for column, names in (
        ("mean_kl", ("kl_divergence_nats", "kl_divergence_stderr_nats")),
        ("mean_top1_agreement", ("top1_agreement", "top1_agreement_stderr")),
    ):
        row |= _mean(column, *((quality.get(name) or {}).values() for name in names))
    scores = ([of.get(key) for of in tasks.values()] for key in ("accuracy", "stderr"))
    row |= _mean("mean_accuracy", *scores)
    training = result.details.get("training") or {}
    row |= {column: training.get(column) for column in TRAINED_COLUMNS}
    for made in MADE_COLUMNS:
        steps = [row[made.replace("make", step)] or 0 for step in ("compress", "finetune")]
        row[made] = sum(steps) if made.endswith("seconds") else max(steps)
    return row


def _mean(column: str, values: Iterable[Any], errors: Iterable[Any]) -> dict[str, float | None]:
    """Return the mean of independent numbers and its standard error, where all are known."""
    values, errors = list(values), list(errors)
    if not values or None in values:
        return {column: None, f"stderr_{column}": None}
    error = None if None in errors else math.hypot(*errors) / len(values)
    return {column: sum(values) / len(values), f"stderr_{column}": error}


def _items(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith("num_items_")}


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Return all columns in the order of the table: what it is, size, quality, cost."""
    seen = list(dict.fromkeys(key for row in rows for key in row))
    quality = [
        column
        for prefix in (*MEANS, *QUALITIES, "stderr", "num_items")
        for column in seen
        if column == prefix or column.startswith(f"{prefix}_")
    ]  # fmt: skip
    return [
        *TEXT_COLUMNS,
        *SIZE_COLUMNS,
        *quality,
        "recovery",
        *TRAINED_COLUMNS,
        *MADE_COLUMNS,
        *COST_COLUMNS,
    ]
