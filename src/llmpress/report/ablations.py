"""The page of one method's ablations: a table per question, self-contained, without scripts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmpress.evaluation.ablations import Ablation, Row
from llmpress.report.html import write_text
from llmpress.report.measures import decimals, significant

Column = tuple[str, str]
STYLE = Path(__file__).parent / "templates" / "report.css"


def write_page(
    ablation: Ablation, rows: Mapping[str, Sequence[Row]], template: Path, page: Path
) -> None:
    """Write the page, whole or not at all.

    Args:
        ablation: What was asked.
        rows: The answers by question.
        template: The page's frame.
        page: The HTML file.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = [
        {"question": question, **table(question.measure, rows[question.key])}
        for question in ablation.questions
    ]
    write_text(
        page,
        environment.get_template(template.name).render(
            ablation=ablation,
            tables=tables,
            style=Markup(STYLE.read_text(encoding="utf-8")),
        ),
    )


def markdown(ablation: Ablation, rows: Mapping[str, Sequence[Row]]) -> str:
    """Return the same tables as Markdown, for the documentation."""
    parts = []
    for question in ablation.questions:
        shown = table(question.measure, rows[question.key])
        parts += [f"## {question.title}", "", question.finding, ""]
        parts += ["| " + " | ".join(shown["headings"]) + " |"]
        parts += ["| " + " | ".join("---" for _ in shown["headings"]) + " |"]
        parts += ["| " + " | ".join(row["cells"]) + " |" for row in shown["rows"]]
        parts += [""]
    return "\n".join(parts)


def table(measure: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return headings, cells, and the length of each row's bar relative to the longest."""
    tables = {"layers": _layers, "perplexity": _perplexity}
    headings, cells, bars = tables.get(measure, _blocks)(rows)
    longest = max(bars)
    return {
        "headings": headings,
        "rows": [
            {"cells": cell, "bar": round(100 * bar / longest, 1)}
            for cell, bar in zip(cells, bars, strict=True)
        ],
    }


Table = tuple[list[str], list[list[str]], list[float]]


def _layers(rows: Sequence[Row]) -> Table:
    names = list(rows[0]["errors"])
    short = [_short(name) for name in names]
    headings = ["", "bits/weight", "output error", *short, "seconds"]
    cells = [
        [
            row["label"],
            decimals(3)(row["bits"]),
            significant(row["error"]),
            *(significant(row["errors"][name]) for name in names),
            decimals(1)(row["seconds"]),
        ]
        for row in rows
    ]
    return headings, cells, [row["error"] for row in rows]


def _blocks(rows: Sequence[Row]) -> Table:
    headings = [
        "",
        "bits/weight",
        "held-out loss before",
        "after",
        "blocks improved",
        "training loss by epoch",
        "held-out loss by epoch",
        "compress, s",
        "finetune, s",
    ]
    cells = [
        [
            row["label"],
            decimals(3)(row["bits"]),
            significant(row["before"]),
            significant(row["after"]),
            f"{row['kept']} of {row['blocks']}",
            ", ".join(significant(value) for value in row["train"]),
            ", ".join(significant(value) for value in row["held_out"]),
            decimals(0)(row["compress_seconds"]),
            decimals(0)(row["finetune_seconds"]),
        ]
        for row in rows
    ]
    return headings, cells, [row["after"] for row in rows]


def _perplexity(rows: Sequence[Row]) -> Table:
    headings = ["", "calibration text", "test text", "test / calibration"]
    cells = [
        [
            row["label"],
            *(decimals(1)(row[text]) for text in ("seen", "test")),
            decimals(2)(row["test"] / row["seen"]),
        ]
        for row in rows
    ]
    return headings, cells, [row["test"] for row in rows]


def _short(name: str) -> str:
    """Return block and projection of a layer's full name."""
    parts = name.split(".")
    number = next(part for part in parts if part.isdigit())
    return f"{parts[-1].removesuffix('_proj')} {number}"
