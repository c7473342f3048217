"""One self-contained HTML file: plotly once, styles and scripts inline, nothing is loaded.

Names, settings and generated text come from outside: jinja2 escapes all of it, and a content
security policy lets only the page's own scripts run and forbids every request. Plotly and the data
of the charts, together three quarters of the page, are held as base64 of gzip.
"""

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from llmpress.core.places import write_whole
from llmpress.report import charts, context
from llmpress.report.canvas import TEMPLATE
from llmpress.report.gaps import Gap, find_gaps
from llmpress.report.measures import NO_VALUE, Measure, decimals, significant, table_measures
from llmpress.report.skipped import skipped
from llmpress.report.speed import speed_caption, speed_rows
from llmpress.report.tables import (
    KIND_LABELS,
    Results,
    blocks_frame,
    layers_frame,
    pairs,
    summary_frame,
)
from llmpress.report.trainings import training_tables

SCRIPTS = ("charts.js", "table.js", "page.js")
WORST_LAYERS = 3


def write_report(
    results: Results,
    params: Mapping[str, Any],
    report: Path,
    summary: Path,
    *,
    pipeline: Path | None = None,
    logs: Path | None = None,
) -> None:
    """Write the report and the table of all runs, each whole or not at all.

    Args:
        results: What `read_results` found.
        params: Content of params.yaml.
        report: The HTML file.
        summary: The CSV file, one row per model and run.
        pipeline: dvc.yaml, which tells what missing results wait for; may be absent.
        logs: Folder of ``<stage>/<name>.log``, read for missing results; may be absent.
    """
    frame = summary_frame(results)
    gaps = find_gaps(results.missing, params, pipeline, logs)
    page = render(results, frame, params, gaps)
    write_text(summary, frame.to_csv(index=False))
    write_text(report, page)


def render(
    results: Results, summary: pd.DataFrame, params: Mapping[str, Any], gaps: Sequence[Gap]
) -> str:
    """Return the report as HTML; the same results give the same text.

    Args:
        results: What `read_results` found.
        summary: One row per model and run.
        params: Content of params.yaml.
        gaps: Why results are missing.
    """
    environment = Environment(
        loader=PackageLoader("llmpress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers, blocks = layers_frame(results), blocks_frame(results)
    evaluation, warnings = context.evaluation_settings(results)
    quality = charts.quality_charts(summary, pairs(results))
    shown = {
        "weight_charts": quality["weights"],
        "delta_charts": quality["deltas"],
        **charts.layer_charts(layers),
        "finetuning_charts": charts.finetuning_charts(blocks),
        "cost_charts": charts.cost_charts(summary),
    }
    figures = {chart.key: chart.variants for group in shown.values() for chart in group}
    scripts = [_inline(_read(name)) for name in SCRIPTS]
    return environment.get_template("report.html.j2").render(
        style=_inline(_read("report.css")),
        scripts=scripts,
        plotly=_packed_plotly(),
        figures=_packed(json.dumps({"template": TEMPLATE, "charts": figures})),
        script_hashes=[_csp_hash(script) for script in (get_plotlyjs(), *scripts)],
        date=context.date(results),
        machines=context.hardware(results),
        versions=context.versions(results),
        found=results.found,
        gaps=gaps,
        skipped=skipped(results, layers, blocks, params),
        warnings=[*warnings, *results.remarks],
        notes=context.low_bit_sources(results, params),
        evaluation=evaluation,
        measured=context.measured(results),
        sources=context.sources(params),
        table=_table(summary),
        worst_layers=list(_worst_layers(layers)),
        blocks=list(_block_rows(blocks)),
        speed_rows=list(speed_rows(results.speed)),
        speed_caption=speed_caption(results.speed),
        training_tables=training_tables(results, params),
        **shown,
        samples=list(_samples(results)),
        provenance=[(result, context.provenance(result)) for result in results.found],
        kind_labels=KIND_LABELS,
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _table(summary: pd.DataFrame) -> dict[str, Any]:
    """Return headings and rows of the table of all runs; columns without a number are left out."""
    measures = [
        measure
        for measure in table_measures(summary.columns)
        if summary[measure.column].fillna(0).ne(0).any()
    ]
    groups: dict[str, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.group, []).append(measure)
    rows = [
        {
            "name": row["name"],
            "kind": KIND_LABELS[row["kind"]],
            "method": _or_dash(row["method"]),
            "original": _or_dash(row["original"]),
            "cells": [(_sort_key(row[m.column]), m.text(row), m) for m in measures],
        }
        for _, row in summary.iterrows()
    ]
    choices = {
        label: list(dict.fromkeys(row[key] for row in rows if row[key] != NO_VALUE))
        for key, label in (("kind", "What"), ("method", "Method"))
    }
    return {"groups": groups, "rows": rows, "choices": choices}


def _worst_layers(layers: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield the layers with the largest error of every run."""
    error = layers["relative_output_error"].fillna(layers["relative_weight_error"])
    ranked = layers.assign(error=error).sort_values("error", ascending=False, kind="stable")
    for run in layers["run"].drop_duplicates():
        for _, row in ranked[ranked["run"] == run].head(WORST_LAYERS).iterrows():
            yield {
                "run": row["run"],
                "name": row["name"],
                "shape": " × ".join(str(size) for size in row["shape"] or ()),
                "bits": _number(row["bits_per_weight"], decimals(3)),
                "output": _number(row["relative_output_error"], significant),
                "weight": _number(row["relative_weight_error"], significant),
            }


def _block_rows(blocks: pd.DataFrame) -> Iterator[dict[str, str]]:
    for _, row in blocks.iterrows():
        yield {
            "run": row["run"],
            "block": str(row["index"]),
            "before": _number(row["loss_before"], significant),
            "after": _number(row["loss_after"], significant),
            "kept": "yes" if row["kept"] else "no",
            "seconds": _number(row["seconds"], decimals(1)),
        }


def _samples(results: Results) -> Iterator[dict[str, Any]]:
    """Yield one group per original and prompt: the original's text first, then every run's."""
    originals = dict.fromkeys(result.original for result in results.found if result.original)
    alone = [
        r.name for r in results.found if r.kind == "model" and not _is_reference(r.name, results)
    ]
    for original in [*originals, *alone]:
        runs = [result for result in results.found if result.original == original]
        names = dict.fromkeys([original, *(run.base for run in runs), *(run.name for run in runs)])
        prompts: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            result = results.get(name)
            for sample in (result.details.get("samples") or []) if result else []:
                prompts.setdefault(sample["prompt"], []).append((str(name), sample["text"]))
        for index, (prompt, texts) in enumerate(prompts.items()):
            first = index == 0
            yield {"original": original, "prompt": prompt, "texts": texts, "first": first}


def _is_reference(name: str, results: Results) -> bool:
    return any(name in (result.original, result.base) for result in results.found)


def _number(value: Any, show: Any) -> str:
    return NO_VALUE if pd.isna(value) else show(value)


def _or_dash(value: Any) -> str:
    return NO_VALUE if pd.isna(value) else str(value)


def _sort_key(value: Any) -> str:
    """Return the number in full, for sorting and for whoever reads the page with a program."""
    return "" if pd.isna(value) else str(value)


def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _inline(text: str) -> Markup:
    """Mark the project's own script or style as safe; only text of this package comes here."""
    if "</script" in text.lower() or "</style" in text.lower():
        raise ValueError("an inline script or style must not hold its own end tag")
    return Markup(text)


@functools.cache
def _packed_plotly() -> Markup:
    return _packed(get_plotlyjs())


def _packed(text: str) -> Markup:
    """Return what `unpack` in charts.js turns back into ``text``."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode())


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
