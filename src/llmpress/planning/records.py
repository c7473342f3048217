"""Seconds from records of finished stages, scaled by work."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter

SHIPPED = Path(__file__).with_name("records.csv")
ELSEWHERE = math.log(10.0)
"""How far off a record of another machine is: as one of ten times the work."""

ALIKE = math.log(2.0)
"""Records count together when they are as near as the nearest, up to a factor of two in work."""


@dataclass(frozen=True)
class Record:
    """How long a stage took.

    Attributes:
        stage: What was done: ``compress`` for deltas too, ``evaluate`` whatever is evaluated.
        method: By which method, or what was trained; empty where it makes no difference.
        model: What it was done to, for the reader.
        work: See `llmpress.planning.stages`.
        seconds: Time without starting Python.
        processor: Of the machine.
        gpu: The same; empty where the processor did the work.
        threads: Of the processor.
        date: When.
    """

    stage: str
    method: str
    model: str
    work: float
    seconds: float
    processor: str
    gpu: str
    threads: int
    date: str


@dataclass(frozen=True)
class Time:
    """Seconds that a stage is expected to take.

    Attributes:
        seconds: Median of the records, each scaled by work.
        low: Least of them.
        high: Largest of them.
        machine: Whose records they are: ``this processor``, or its name, or that of a GPU.
        basis: What the estimate rests on, in words.
    """

    seconds: float
    low: float
    high: float
    machine: str
    basis: str


def read_records(file: Path = SHIPPED) -> list[Record]:
    """Read a table of records; by default the one that comes with llmpress."""
    with file.open(encoding="utf-8", newline="") as lines:
        return TypeAdapter(list[Record]).validate_python(list(csv.DictReader(lines)))


def estimate_time(
    records: Sequence[Record], kind: tuple[str, str], work: float, machine: tuple[str, str]
) -> Time | None:
    """Scale the records of a stage that are nearest to what is asked; None without any.

    Seconds are taken to grow as the work does. Records of the same processor and GPU are preferred,
    unless those of another one are of much nearer work; those of a GPU say nothing of a processor.

    Args:
        records: All there are.
        kind: Stage and method.
        work: Of what is planned.
        machine: Processor and GPU.
    """

    def distance(record: Record) -> float:
        here = (record.processor, record.gpu) == machine
        return abs(math.log(work / record.work)) + (0.0 if here else ELSEWHERE)

    known = [r for r in records if (r.stage, r.method) == kind and bool(r.gpu) == bool(machine[1])]
    if not known or not work:
        return None
    nearest = min(known, key=distance)
    source = (nearest.processor, nearest.gpu)
    near = [r for r in known if distance(r) <= distance(nearest) + ALIKE]
    near = [r for r in near if (r.processor, r.gpu) == source]
    scaled = [r.seconds * work / r.work for r in near]
    name = "this GPU" if machine[1] else "this processor"
    if source != machine:
        name = (nearest.gpu or nearest.processor).replace("(R)", "").removesuffix(" Processor")
    factor = work / nearest.work
    scale = "" if 0.8 < factor < 1.25 else f", ×{factor:.0f}" if factor > 10 else f", ×{factor:.2g}"
    return Time(
        seconds=median(scaled),
        low=min(scaled),
        high=max(scaled),
        machine=name,
        basis=f"{len(near)} of {name}{scale}",
    )
