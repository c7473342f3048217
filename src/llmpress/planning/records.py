"""Seconds from records of finished stages, scaled by work."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

SHIPPED = Path(__file__).with_name("records.csv")


@dataclass(frozen=True)
class Record:
    """How long a stage took: the median of alike runs."""

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

    seconds: float  # those of the nearest record, scaled by work
    machine: str  # whose record that is
    factor: float  # how many times its work


@cache
def read_records() -> list[Record]:
    """Read the table of records that comes with llmpress."""
    with SHIPPED.open(encoding="utf-8", newline="") as lines:
        return TypeAdapter(list[Record]).validate_python(list(csv.DictReader(lines)))


def estimate_time(
    records: Sequence[Record], kind: tuple[str, str], work: float, machine: tuple[str, str]
) -> Time | None:
    """Scale the record of a stage and method that is nearest in work; None without any.

    Those of the same ``machine`` (processor and GPU) come first; those of a GPU say nothing of a
    processor.
    """

    def distance(record: Record) -> tuple[bool, float]:
        elsewhere = (record.processor, record.gpu) != machine
        return elsewhere, abs(math.log(work / record.work))

    known = [r for r in records if (r.stage, r.method) == kind and bool(r.gpu) == bool(machine[1])]
    if not known or not work:
        return None
    nearest = min(known, key=distance)
    factor, name = work / nearest.work, nearest.gpu or nearest.processor
    return Time(nearest.seconds * factor, name.replace("(R)", ""), factor)
