"""A task's folder: items as JSON lines, and the task.yaml that lm-eval reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.rows import read_rows

TASK_FILE = "task.yaml"
TEST_FILE = "test.jsonl"
TRAIN_FILE = "train.jsonl"


def write_items(file: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, UTF-8."""
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def read_items(file: Path) -> list[dict[str, Any]]:
    """Read what `write_items` wrote.

    Raises:
        ArtifactError: Missing, or damaged.
    """
    try:
        return read_rows(file)
    except FileNotFoundError:
        raise ArtifactError(f"{file}: no such file; fetch a task that has this part") from None
    except SourceError as error:
        raise ArtifactError(f"{error}; fetch it again") from None


def write_task(
    folder: Path, config: Mapping[str, Any], splits: Mapping[str, Iterable[Mapping[str, Any]]]
) -> None:
    """Write ``<split>.jsonl`` for each split and the lm-eval configuration as task.yaml.

    The configuration's data files are relative to the folder; whoever runs the task makes them
    absolute.
    """
    for name, items in splits.items():
        write_items(folder / f"{name}.jsonl", items)
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    (folder / TASK_FILE).write_text(text, encoding="utf-8")
