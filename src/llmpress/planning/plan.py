"""What stages need and how long they take, compared with a machine."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch

from llmpress.core.environment import hardware
from llmpress.planning.records import Time
from llmpress.planning.stages import Need

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What a plan is compared with."""

    memory_available_bytes: int  # without swapping; the limit of a container included
    disk_free_bytes: int  # on the file system that the plan writes to
    device_memory_free_bytes: int  # of the GPU; 0 without one
    processor: str
    gpu: str  # empty without one


@dataclass(frozen=True)
class PlanRow:
    """One stage instance."""

    stage: str  # name in dvc.yaml without its key
    name: str  # its key
    need: Need | None  # without a GPU all memory is the computer's; None if not known yet
    time: Time | None = None  # None without a record
    present: bool = False  # whether it lies there; the engine decides if it is up to date
    problems: tuple[str, ...] = ()  # what does not fit and what helps; or why nothing is known


@dataclass(frozen=True)
class Plan:
    """All rows, in the order in which stages depend on each other, and what they add up to."""

    rows: tuple[PlanRow, ...]
    machine: Machine
    memory_bytes: int  # of the row that needs most
    device_memory_bytes: int  # the same on the GPU
    disk_bytes: int  # of all artifacts
    disk_missing_bytes: int  # of those that are not there yet, with the largest scratch
    seconds: float  # of all rows with a time, one after another
    problems: tuple[str, ...]  # of all artifacts together, where each fits by itself
    fits: bool


def measure_machine(folder: Path = Path()) -> Machine:
    """Look at this machine; ``folder`` lies on the disk that is written to."""
    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit
        limit, used = (int((CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        available = min(available, max(0, limit - used))
    found = hardware()
    return Machine(
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        device_memory_free_bytes=torch.cuda.mem_get_info()[0] if found["gpu"] else 0,
        processor=found["processor"],
        gpu=found["gpu"] or "",
    )


def shortages(compared: Mapping[str, tuple[int, int]], remedy: str) -> tuple[str, ...]:
    """Say of which resource more bytes are needed (the first number) than are free."""
    return tuple(
        f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free, "
        f"{(needed - free) / 1e9:.1f} GB too much; {remedy}"
        for what, (needed, free) in compared.items()
        if needed > free
    )


def summarize(rows: Sequence[PlanRow], machine: Machine) -> Plan:
    """Add rows up and compare all missing artifacts together with the free disk."""
    needs = [row.need for row in rows if row.need]
    missing = [row.need for row in rows if row.need and not row.present]
    written = sum(need.artifact_bytes for need in missing)
    written += max((need.scratch_bytes for need in missing), default=0)
    fits = not any(row.problems for row in rows if row.need)
    disk = {"disk": (written, machine.disk_free_bytes)} if fits else {}
    problems = shortages(disk, "free some disk, or leave some runs out")
    return Plan(
        rows=tuple(rows),
        machine=machine,
        memory_bytes=max((need.host_bytes for need in needs), default=0),
        device_memory_bytes=max((need.device_bytes for need in needs), default=0),
        disk_bytes=sum(need.artifact_bytes for need in needs),
        disk_missing_bytes=written,
        seconds=sum(row.time.seconds for row in rows if row.time),
        problems=problems,
        fits=fits and not problems,
    )
