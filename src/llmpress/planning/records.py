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
    """How long a stage took; in the table that comes along, the median of alike runs."""

    stage: str  # the first word of its name: compress, evaluate
    method: str  # by which method, or what was trained; empty where it makes no difference
    model: str  # of what, for the reader
    work: float  # see `llmpress.planning.stages`
    seconds: float  # without starting Python
    processor: str
    gpu: str  # empty where the processor did the work
    threads: int  # of the processor


@dataclass(frozen=True)
class Time:
    """Seconds that a stage is expected to take."""

    seconds: float  # median of the records, each scaled by work
    machine: str  # whose records they are: this processor, or its name, or that of a GPU
    basis: str  # what the estimate rests on, in words


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
        kind: The stage, as records name it, and the method.
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
    near = [r for r in known if (r.processor, r.gpu) == source]
    near = [r for r in near if distance(r) <= distance(nearest) + ALIKE]
    name = "this GPU" if machine[1] else "this processor"
    if source != machine:
        name = (nearest.gpu or nearest.processor).replace("(R)", "").removesuffix(" Processor")
    factor = work / nearest.work
    scale = "" if 0.8 < factor < 1.25 else f", ×{factor:.0f}" if factor > 10 else f", ×{factor:.2g}"
    seconds = median(record.seconds * work / record.work for record in near)
    return Time(seconds, name, f"{len(near)} of {name}{scale}")
