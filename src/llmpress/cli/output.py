"""What all commands print alike: JSON for scripts, tables and sizes for people."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON on stdout, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns whose cells all start with a digit or a sign are aligned right."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        cells = [row[index] for row in rows if row[index] not in ("", "—")]
        numeric = bool(cells) and all(cell.lstrip("+-−~<")[:1].isdigit() for cell in cells)
        justify: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    printer = console()
    printer.print(title, style="bold", soft_wrap=True)
    grid = Table(box=None, show_header=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, value)
    printer.print(grid)


def console() -> Console:
    """Return a console on stdout; names in square brackets are text, never markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units, ``101.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
