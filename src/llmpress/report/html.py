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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from llmpress.core.places import write_whole
from llmpress.report import charts, context
from llmpress.report.advice import DISK, advise
from llmpress.report.canvas import TEMPLATE
from llmpress.report.comparison import Pairs, Place, places
from llmpress.report.gaps import find_gaps
from llmpress.report.grid import Grid, shown
from llmpress.report.groups import Group, find_groups
from llmpress.report.measures import (
    BROKEN,
    COSTS,
    KL,
    MEAN_KL,
    NO_VALUE,
    RECOVERY,
    SAME,
    SIZES,
    TRAINED,
    Measure,
    Row,
    megabytes,
    shorten,
)
from llmpress.report.runs import parts
from llmpress.report.skipped import skipped
from llmpress.report.speed import speed_table
from llmpress.report.tables import Results, blocks_frame, layers_frame, summary_frame

BY_CORPUS = "KL divergence by corpus"
MOST_TIED = 3  # runs that are shown of those that are not told apart
SCRIPTS = ("charts.js", "table.js", "page.js")


def write_report(
    results: Results,
    params: Mapping[str, Any],
    report: Path,
    table: Path,
    *,
    pipeline: Path | None = None,
    logs: Path | None = None,
) -> None:
    """Write the report and the table of all runs, each whole or not at all.

    Args:
        results: What `read_results` found.
        params: Content of params.yaml; empty without one.
        report: The HTML file.
        table: The CSV file: a row for each model and run, those without a result too.
        pipeline: dvc.yaml, which tells what missing results wait for; may be absent.
        logs: Folder of ``<stage>/<name>.log``, read for missing results; may be absent.
    """
    frame = summary_frame(results)
    gaps = find_gaps(results.missing, params, pipeline, logs)
    page = render(results, frame, params, gaps)
    write_text(table, rows_of_runs(results, frame).to_csv(index=False))
    write_text(report, page)


def rows_of_runs(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary with what is known of each run's place, and rows of missing results."""
    groups, pairs = find_groups(summary), Pairs(results)
    found: dict[str, Place] = {}
    for group in groups:
        found |= places(group.working, DISK, MEAN_KL, pairs)
    broken = set[str]().union(*(group.broken for group in groups))
    states = ["broken" if name in broken else "measured" for name in summary["name"]]
    said = [str(found.get(name, "")) for name in summary["name"]]
    frame = summary.copy()
    frame.insert(1, "state", states)
    frame.insert(2, "place", said)
    frame.insert(3, "measured", [context.measured_on(result) for result in results.found])
    frame.insert(4, "megabytes", frame["model_bytes"] / 1e6)
    return frame.reindex(range(len(frame) + len(results.missing))).assign(
        name=[*summary["name"], *results.missing],
        state=[*states, *["missing"] * len(results.missing)],
    )


def render(results: Results, summary: pd.DataFrame, params: Mapping[str, Any], gaps: Grid) -> str:
    """Return the report as HTML; the same results give the same text.

    Args:
        results: What `read_results` found.
        summary: One row per model and run.
        params: Content of params.yaml; empty without one.
        gaps: Why results are missing.
    """
    environment = Environment(
        loader=PackageLoader("llmpress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shorten"] = shorten
    layers, blocks = layers_frame(results), blocks_frame(results)
    groups, pairs = find_groups(summary), Pairs(results)
    evaluation, warnings = context.evaluation_settings(results)
    methods = sorted(summary["method"].dropna().unique())
    compared = [charts.quality_chart(group, methods, pairs) for group in groups]
    drawn = {
        "quality_charts": [chart for chart in compared if chart],
        "layer_maps": charts.layer_charts(layers),
        "finetuning_charts": charts.finetuning_charts(blocks),
    }
    figures = {chart.key: chart.variants for group in drawn.values() for chart in group}
    tables = [_table(group, pairs) for group in groups]
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
        names=[result.name for result in results.found],
        missing=list(results.missing),
        gaps=gaps,
        skipped=skipped(results, layers, blocks, params),
        notes=[*warnings, *results.remarks, *context.low_bit_sources(results, params)],
        num_warnings=len(warnings),
        evaluation=evaluation,
        measured=context.measured(results),
        sources=context.sources(params),
        advice=_advice([g for g in groups if g.what in ("Weights", "Deltas")], pairs),
        tables=tables,
        column_groups=dict.fromkeys(name for table in tables for name in table["headings"]),
        hidden=(SAME, BY_CORPUS),  # unless the reader asks for them
        speed=speed_table(results.speed),
        **drawn,
        parts=list(parts(results, groups, layers, blocks, pairs)),
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _advice(groups: Sequence[Group], pairs: Pairs) -> dict[str, Any]:
    """Return which run to take at each size, with its numbers, and the models to compare with."""
    wanted = [*SIZES[1::-1], *dict.fromkeys(m for g in groups for m in g.headlines), *COSTS[:1]]

    def line(run: Row, group: Group) -> tuple[str, list[str]]:
        return str(run["name"]), [
            m.text(run, group.original) if m.column in run else NO_VALUE for m in wanted
        ]

    bodies = []
    for group in groups:
        advised, rows = advise(group, pairs), []
        for index, advice in enumerate(advised):
            same = index > 0 and advice.runs[:1] == advised[index - 1].runs[:1]
            rows.append(
                {
                    "budget": f"{megabytes(advice.budget)} MB",
                    "runs": [] if same else [line(r, group) for r in advice.runs[:MOST_TIED]],
                    "tied": len(advice.runs) > 1,
                    "same": str(advice.runs[0]["name"]) if same and advice.runs else "",
                    "evidence": advice.evidence,
                }
            )
        references = [line(row, group) for row in group.references]
        bodies.append({"title": group.title, "rows": rows, "references": references})
    return {"measures": wanted, "bodies": bodies}


def _table(group: Group, pairs: Pairs) -> dict[str, Any]:
    """Return headings and rows of the table of a group's runs; what no run has is left out."""
    measures = group.measured([*SIZES, *group.qualities, RECOVERY, *TRAINED, *COSTS])
    headings: dict[str, list[Measure]] = {}
    for measure in measures:
        apart = measure.group == KL and measure not in group.headlines
        headings.setdefault(BY_CORPUS if apart else measure.group, []).append(measure)
    headed = [(heading, measure) for heading, those in headings.items() for measure in those]
    found = places(group.working, DISK, MEAN_KL, pairs)
    original = group.original

    def line(row: Row) -> dict[str, Any]:
        name, tuned = str(row["name"]), row["kind"] in ("finetuned", "recovered")
        return {
            "name": name,
            "method": f"{shown(row['method'], str)}{', finetuned' if tuned else ''}",
            "place": BROKEN if name in group.broken else str(found.get(name, NO_VALUE)),
            "cells": [
                (shown(row[m.column], str), m.text(row, original), m.column, heading)
                for heading, m in headed
            ],
        }

    return {
        "key": group.key,
        "title": group.title,
        "headings": headings,
        "references": [line(row) for row in group.references],
        "rows": [line(row) for row in group.runs],
    }


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
