"""What stands around the numbers: when, on what, with which settings, from which sources."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmpress.core.records import entry
from llmpress.report.grid import Grid
from llmpress.report.measures import plain
from llmpress.report.tables import Result, Results

SHOWN_PACKAGES = ("llmpress", "torch", "transformers")
_WORDS = {
    "windows": "windows per corpus",
    "length": "tokens per window",
    "tokens_scored": "tokens scored of",
    "dtype": "precision of likelihoods",
    "task_dtype": "precision of tasks",
    "task_items": "items of task",
    "task_metrics": "metric of task",
    "num_threads": "threads",
}
VARYING_KEYS = re.compile(r"second|memory|created|fingerprint|file", re.IGNORECASE)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(dotted key, text)`` for every leaf of nested mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}.{index}")
    else:
        yield prefix, plain(value)


def date(results: Results) -> str:
    """Return when the newest shown artifact was made: the same results give the same text."""
    dates = [
        str(record["created"])
        for result in results.found
        for record in _records(result)
        if record.get("created")
    ]
    return max(dates, default="date unknown").replace("T", " ").replace("+00:00", " UTC")


def measured_on(result: Result) -> str:
    """Return the day of its evaluation; empty where it is not recorded."""
    record = (result.details.get("provenance") or {}).get("evaluation") or {}
    return str(record.get("created") or "").partition("T")[0]


def hardware(results: Results) -> list[str]:
    """Return every machine of the results, as ``Xeon, 2 cores, 1 or 2 threads, no GPU``."""
    threads: dict[tuple[str, str], dict[str, None]] = {}
    for result in results.found:
        for record in _records(result):
            machine = record.get("hardware")
            if isinstance(machine, Mapping):
                processor = plain(machine.get("processor") or "unknown processor")
                cores = f", {n} core{'s' * (n != 1)}" if (n := machine.get("cores")) else ""
                key = f"{processor}{cores}", plain(machine.get("gpu") or "no GPU")
                threads.setdefault(key, {})[plain(machine.get("threads") or "unknown")] = None
    return [
        f"{processor}, {' or '.join(sorted(counts))} thread{'s' * ([*counts] != ['1'])}, {gpu}"
        for (processor, gpu), counts in threads.items()
    ]


def versions(results: Results) -> list[str]:
    """Return the versions of the main packages the results were made with, as ``torch 2.13.0``."""
    packages = [
        record["packages"]
        for result in results.found
        for record in _records(result)
        if isinstance(record.get("packages"), Mapping)
    ]
    return [
        f"{name} {' and '.join(numbers)}"
        for name in SHOWN_PACKAGES
        if (numbers := sorted({str(p[name]) for p in packages if p.get(name)}))
    ]


def evaluation_settings(results: Results) -> tuple[list[tuple[str, str]], list[str]]:
    """Return how the runs were evaluated, and where runs of one original differ.

    Returns:
        ``(what, value)`` pairs in words, and for each on which runs that are compared disagree a
        sentence naming them: such numbers must not be compared.
    """
    values: dict[str, dict[str, None]] = {}
    by_original: dict[tuple[str, str], dict[str, list[str]]] = {}
    for result in results.found:
        for key, text in flatten(result.details.get("evaluation") or {}):
            if not VARYING_KEYS.search(key):
                values.setdefault(in_words(key), {})[text] = None
                compared = (in_words(key), result.original or result.name)
                by_original.setdefault(compared, {}).setdefault(text, []).append(result.name)
    warnings = []
    for (what, _), names in by_original.items():
        if len(names) > 1:
            parts = (f"{text} for {', '.join(runs)}" for text, runs in names.items())
            warnings.append(f"Not evaluated alike, {what}: {'; '.join(parts)}.")
    return [(what, " or ".join(texts)) for what, texts in values.items()], warnings


def in_words(key: str) -> str:
    """Return what a key of the record of an evaluation means, ``task_items.calls`` and the like."""
    name, _, of = key.partition(".")
    words = _WORDS.get(name, name.replace("_", " "))
    return f"{words} {of}" if of else words


def measured(results: Results) -> list[str]:
    """Return what a reader of the numbers must know, each sentence once."""
    texts: dict[str, None] = {}
    items: dict[str, None] = {}
    for result in results.found:
        record = result.details.get("evaluation")
        if record:
            texts[
                f"Perplexity, divergence and agreement: {record['windows']} windows of "
                f"{record['length']} tokens of each corpus's {record['split']} text, "
                f"in {record['dtype']}."
            ] = None
            for task, count in record["task_items"].items():
                items[f"{count} items of {task}, in {record['task_dtype']}"] = None
    return [*texts, *([f"Tasks: {'; '.join(items)}."] if items else [])]


def low_bit_sources(results: Results, params: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every model that was opened from an already quantized GGUF file."""
    files = {
        name: str(source["file"])
        for name, source in (params.get("models") or {}).items()
        if str(source.get("file", "")).lower().endswith(".gguf")
    }
    for result in results.found:
        if result.kind == "model":
            for record in _records(result):
                for _, text in flatten(record.get("settings") or {}):
                    if text.lower().endswith(".gguf"):
                        files.setdefault(result.name, text)
    sentences = []
    for name, file in files.items():
        bits = re.search(r"\bI?Q(\d)_", file, re.IGNORECASE)
        form = f"{bits[1]}-bit" if bits else "possibly quantized"
        sentences.append(
            f"The source of {name} was a {form} GGUF file ({file.rpartition('/')[2]}): the "
            "original here is that file in full precision, so quantizing back onto its grid can "
            "look lossless."
        )
    return sentences


def sources(params: Mapping[str, Any]) -> Grid:
    """Return a row for every model, corpus and task in params.yaml."""
    sections = {
        "models": "model",
        "finetuned_models": "fine-tuned model",
        "corpora": "corpus",
        "tasks": "task",
    }
    rows = [
        (name, what, "; ".join(f"{key}: {text}" for key, text in flatten(settings)))
        for section, what in sections.items()
        for name, settings in (params.get(section) or {}).items()
    ]
    caption = "What the models, texts and tasks are"
    return Grid("Sources in params.yaml", caption, ["Name", "What", "Description"], rows)


def provenance(result: Result) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return headed groups of ``(key, value)``: settings, evaluation, artifact, source, ..."""
    details = result.details
    groups: dict[str, Any] = {
        "Settings": details.get("settings"),
        "Training": details.get("training"),
        "Evaluation": details.get("evaluation"),
        "Totals": result.records and entry(result.records.totals),
    }
    for role, record in (details.get("provenance") or {}).items():
        groups[f"Provenance of the {role}"] = record
    return [(heading, list(flatten(value))) for heading, value in groups.items() if value]


def _records(result: Result) -> list[Mapping[str, Any]]:
    """Return the provenance records of a result: its artifact, its source, its evaluation."""
    records = (result.details.get("provenance") or {}).values()
    return [record for record in records if isinstance(record, Mapping)]
