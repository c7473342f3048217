"""What all benchmarks do with a result: a row below those of earlier runs."""

import csv
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmpress.core.environment import hardware, packages


def append_rows(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, below a heading that is written once; what is there must have the same."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        is_new = not out.is_file()
        if not is_new:
            with out.open(newline="", encoding="utf-8") as file:
                if next(csv.reader(file), None) != list(row):
                    raise SystemExit(
                        f"error: {out}: other columns than these rows; name another --out"
                    )
        with out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def origin(*names: str) -> dict[str, Any]:
    """Return columns that say where and when a row was measured, and with which packages."""
    machine, versions = hardware(), packages()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": machine["processor"],
        "gpu": machine["gpu"],
        **{name: versions[name] for name in ("torch", *names)},
        "commit": commit or os.environ.get("COMMIT", ""),  # a copy without git is told
        "date": datetime.now(UTC).date().isoformat(),
    }
