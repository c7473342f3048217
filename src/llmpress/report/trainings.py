"""End-to-end finetuning: what was trained beside what it started from, and full finetuning."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmpress.report.measures import NO_VALUE, decimals, megabytes, percent, significant
from llmpress.report.tables import Result, Results

HEADINGS = (
    *("Trained", "Trainable parameters", "% of the model", "Steps × batch", "Held-out loss, nats"),
    *("Bits per weight", "MB to store", "Peak MB", "Seconds"),
)


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: Its heading.
        caption: A sentence on what is compared.
        headings: Of all columns but the first, the name.
        rows: Name and cells.
    """

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def training_tables(results: Results, params: Mapping[str, Any]) -> list[Table]:
    """Return a table for every task that was trained on, and one for text.

    Args:
        results: What `read_results` found.
        params: Content of params.yaml.
    """
    trainings = {
        name: entry
        for name, entry in (params.get("trainings") or {}).items()
        if results.get(name) is not None
    }
    tasks = dict.fromkeys(entry["task"] for entry in trainings.values() if entry.get("task"))
    tables = [_task_table(task, trainings, results, params) for task in tasks]
    on_text = {name: entry for name, entry in trainings.items() if entry.get("corpora")}
    return [*tables, _text_table(on_text, results)] if on_text else tables


def start_name(entry: Mapping[str, Any]) -> str:
    """Return the name of the run, finetune or model that a training starts from."""
    return str(entry["start"]).rpartition("/")[2]


def _task_table(
    task: str,
    trainings: Mapping[str, Mapping[str, Any]],
    results: Results,
    params: Mapping[str, Any],
) -> Table:
    entries = {name: entry for name, entry in trainings.items() if entry.get("task") == task}
    models = {entry["model"] for entry in entries.values()}
    full = {
        name: str(entry["base"])
        for name, entry in (params.get("finetuned_models") or {}).items()
        if entry.get("task") == task and entry["base"] in models
    }
    rows = []
    for name, start in [*full.items(), *((n, start_name(e)) for n, e in entries.items())]:
        result = results.get(name)
        if result is not None:
            before = _accuracy(results.get(start), task)
            rows.append((name, [before, _accuracy(result, task), *_cells(result)]))
    return Table(
        f"Trained on {task}",
        "Full finetuning, adapters and codebooks or factors, as far as they were trained on this "
        "task. Full finetuning trains all linears of the decoder blocks. Sizes count what has to "
        "be stored to use the result; accuracies are ± one standard error.",
        [f"{task} before, %", f"{task} after, %", *HEADINGS],
        rows,
    )


def _text_table(trainings: Mapping[str, Mapping[str, Any]], results: Results) -> Table:
    found = {name: results.get(name) for name in trainings}
    corpora = dict.fromkeys(
        corpus for result in found.values() if result for corpus in _perplexities(result)
    )
    rows = []
    for name, entry in trainings.items():
        result, start = found[name], results.get(start_name(entry))
        if result is not None:
            before = _perplexities(start) if start else {}
            after = _perplexities(result)
            both = (f"{_shown(before.get(c))} → {_shown(after.get(c))}" for c in corpora)
            rows.append((name, [*both, *_cells(result)]))
    return Table(
        "Recovered on text",
        "Perplexity of the start and of what end-to-end finetuning on text made of it.",
        [*(f"Perplexity {corpus}, before → after" for corpus in corpora), *HEADINGS],
        rows,
    )


def _cells(result: Result) -> Iterator[str]:
    """Yield what stands below `HEADINGS`."""
    record = result.details.get("training") or {}
    settings = record.get("settings") or {}
    size = result.metrics.get("size") or {}
    made = (result.details.get("provenance") or {}).get("artifact") or {}
    weights = size.get("model_weights")
    # full finetuning trains the linears of the blocks, and those are what its size counts
    trained = record.get("trainable_parameters", size.get("compressed_weights"))
    yield str(record.get("trains", "all linears"))
    yield f"{trained:,}" if trained is not None else NO_VALUE
    yield f"{100 * trained / weights:.2f}" if trained is not None and weights else NO_VALUE
    steps, batch = settings.get("steps"), settings.get("batch_size")
    yield f"{steps} × {batch}" if steps else NO_VALUE
    if "loss_before" in record:
        after = _shown(record["loss_after"]) if record["best_step"] else "not lower, start kept"
        yield f"{_shown(record['loss_before'])} → {after}"
    else:
        yield NO_VALUE
    yield _shown(size.get("bits_per_weight"), decimals(2))
    yield _shown(size.get("model_bytes"), megabytes)
    yield _shown(made.get("peak_memory_bytes"), megabytes)
    yield _shown(made.get("seconds"), decimals(0))


def _accuracy(result: Result | None, task: str) -> str:
    scores = ((result.metrics.get("quality") or {}).get("tasks") or {}) if result else {}
    if task not in scores:
        return NO_VALUE
    return f"{percent(scores[task]['accuracy'])} ± {percent(scores[task]['stderr'])}"


def _perplexities(result: Result) -> Mapping[str, float]:
    return (result.metrics.get("quality") or {}).get("perplexity") or {}


def _shown(value: Any, show: Any = significant) -> str:
    return NO_VALUE if value is None or pd.isna(value) else str(show(value))
