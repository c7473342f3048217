"""The stages of dvc.yaml, one for each name: what runs, what it reads and what it makes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Job:
    """One stage for one name, as dvc.yaml says.

    Attributes:
        stage: Key below ``stages``.
        key: Which of its ``foreach``; empty for a plain stage.
        inputs: What it reads, relative to dvc.yaml.
        outputs: What it makes.
    """

    stage: str
    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.stage} {self.key}".strip()

    @property
    def verb(self) -> str:
        """What it does, whatever it does it to: ``evaluate`` of ``evaluate_delta``."""
        return self.stage.partition("_")[0]

    def reads(self, other: "Job") -> bool:
        """Tell whether it reads something that the other makes."""
        made = [f"{output}/" for output in other.outputs]
        return any(output.startswith(f"{path}/") for output in made for path in self.inputs)


def read_jobs(pipeline: Path, params: Mapping[str, Any]) -> list[Job]:
    """Return every stage of dvc.yaml for every name; none where it cannot be read.

    Args:
        pipeline: dvc.yaml.
        params: Content of params.yaml, which its templates refer to.
    """
    try:
        stages = yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return []
    return [job for stage, entry in stages.items() for job in _jobs(str(stage), entry, params)]


def _jobs(stage: str, entry: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[Job]:
    items, do = entry.get("foreach", {"": None}), entry.get("do", entry)
    if isinstance(items, str):
        items = _lookup(items.removeprefix("${").removesuffix("}"), params)
    pairs = items.items() if isinstance(items, Mapping) else ((item, item) for item in items or ())
    for key, item in pairs:
        names = {"key": key, "item": item}
        made = _paths(do, ("outs", "metrics", "plots"), names)
        yield Job(stage, str(key), _paths(do, ("deps",), names), made)


def _paths(
    entry: Mapping[str, Any], kinds: Sequence[str], names: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the paths below these keys, with ``${item.model}`` and the like put in."""
    found = [path for kind in kinds for path in entry.get(kind) or ()]
    plain = (str(next(iter(path)) if isinstance(path, Mapping) else path) for path in found)
    return tuple(
        re.sub(r"\$\{([\w.-]+)\}", lambda match: str(_lookup(match[1], names)), path)
        for path in plain
    )


def _lookup(name: str, values: Any) -> Any:
    """Return the value of a dotted name; None when there is none."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
