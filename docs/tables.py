"""Keep the tables of the documentation equal to the results they show.

A table that is made of results stands between two comments, the first of which says how:

    <!-- table: studies/quality/results/report.csv
    columns:
      "": "{label}"
      bits: "{bits_per_weight:.2f}"
      perplexity: "{perplexity_wikipedia:.1f} ± {stderr_perplexity_wikipedia:.1f}"
    rows: {smollm2: original, rtn-3: "rtn, 3 bits"}
    -->
    ...
    <!-- /table -->

The file is a CSV with a column ``name``; of several files, with spaces between, all rows count.
A column's value is a format string over one of its rows, or a list of some, of which the first is
taken that the row has everything for; without one the cell stays empty. ``rows`` are names with
their labels, in order, or sorted by the column that ``sort`` names; without it all rows are shown.
``same`` gives columns of another file the names that they have here.

    python docs/tables.py --check    # exit status 1 when a table differs
    python docs/tables.py --write    # correct them
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/**/*.md", "studies/*.md")
TABLE = re.compile(r"(<!-- table: ([^\n]+)\n(.*?)-->\n)(.*?)(<!-- /table -->)", re.DOTALL)
FIELD = re.compile(r"\{([\w-]+)(:[^}]*)?\}")


def filled(page: str, root: Path = ROOT) -> str:
    """Return a page with its tables made anew.

    Raises:
        ValueError: A table's source, a row or a column does not exist.
    """
    return TABLE.sub(lambda m: f"{m[1]}{_table(m[2], yaml.safe_load(m[3]), root)}{m[5]}", page)


def _table(sources: str, shape: dict[str, Any], root: Path) -> str:
    known: dict[str, dict[str, str]] = {}
    for source in sources.split():
        known |= _rows(root / source, shape.get("same", {}))
    labels = shape.get("rows") or {name: name for name in known}
    if missing := labels.keys() - known.keys():
        raise ValueError(f"{sources}: no row {', '.join(sorted(missing))}")
    rows = [known[name] | {"label": label} for name, label in labels.items()]
    if "sort" in shape:
        rows.sort(key=lambda row: float(row[shape["sort"]]))
    columns = shape["columns"]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(value, row, rows) for value in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _rows(file: Path, same: dict[str, str]) -> dict[str, dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: run its study first, see studies/README.md")
    with file.open(newline="", encoding="utf-8") as lines:
        read = list(csv.DictReader(lines))
    return {row["name"]: row | {new: row[old] for new, old in same.items() if old in row}
            for row in read}  # fmt: skip


def _cell(layout: str | list[str], row: dict[str, str], rows: list[dict[str, str]]) -> str:
    for template in [layout] if isinstance(layout, str) else layout:
        names = [name for name, _ in FIELD.findall(template)]
        if unknown := [name for name in names if not any(name in other for other in rows)]:
            raise ValueError(f"no column {', '.join(unknown)}")
        if all(row.get(name, "") != "" for name in names):
            return FIELD.sub(lambda field: _value(row[field[1]], field[2]), template)
    return ""


def _value(text: str, layout: str | None) -> str:
    return format(float(text), layout[1:]) if layout else text


def main() -> None:
    """Check or correct every page."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    different = []
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        page = path.read_text(encoding="utf-8")
        try:
            new = filled(page)
        except ValueError as error:
            sys.exit(f"error: {path.relative_to(ROOT)}: {error}")
        if new != page:
            different.append(str(path.relative_to(ROOT)))
            if arguments.write:
                path.write_text(new, encoding="utf-8")
    if different and arguments.check:
        names = ", ".join(different)
        sys.exit(f"error: tables differ from results: {names}; run python docs/tables.py --write")


if __name__ == "__main__":
    main()
