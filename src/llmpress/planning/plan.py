"""What stages need and how long they take, compared with a machine."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch

from llmpress.core.environment import hardware
from llmpress.planning.records import Record, Time, estimate_time
from llmpress.planning.stages import Need

CGROUP = Path("/sys/fs/cgroup")
REMEDIES = {
    "calibrate": ", or lower `windows` or `length` of the calibration",
    "finetune": ", or lower `batch_size`, or `windows` and `length` of the calibration",
    "train": ", or lower `batch_size` or `length`",
    "train_task": ", or lower `batch_size`",
    "evaluate": ", or bfloat16 as `dtype`, or a lower `length` of the evaluation",
}


@dataclass(frozen=True)
class Machine:
    """What a plan is compared with.

    Attributes:
        memory_available_bytes: Host memory that can be used without swapping, the limit of a
            container included.
        disk_free_bytes: On the file system that the plan writes to.
        device_memory_free_bytes: Of the GPU; 0 without one.
        processor: Its name.
        gpu: Its name; empty without one.
    """

    memory_available_bytes: int
    disk_free_bytes: int
    device_memory_free_bytes: int
    processor: str
    gpu: str


@dataclass(frozen=True)
class PlanRow:
    """One stage instance.

    Attributes:
        stage: Name in dvc.yaml without its key.
        name: Its key.
        need: Memory and disk; without a GPU all memory is the computer's. None if not known yet.
        time: Seconds, and what they rest on; None without a record.
        present: Whether the artifact lies there already; the engine decides if it is up to date.
        problems: What does not fit, by how much, what to lower; or why nothing is known.
    """

    stage: str
    name: str
    need: Need | None
    time: Time | None = None
    present: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All rows and what they add up to.

    Attributes:
        rows: In the order in which the stages depend on each other.
        machine: What they were compared with.
        memory_bytes: Of the row that needs most.
        device_memory_bytes: The same on the GPU.
        disk_bytes: Of all artifacts.
        disk_missing_bytes: Of the artifacts that are not there yet, with the largest scratch.
        seconds: Of all rows with a time, one after another, artifacts that are there included.
        problems: Of all artifacts together.
        fits: Whether every row fits, and all missing artifacts together fit the disk.
    """

    rows: tuple[PlanRow, ...]
    machine: Machine
    memory_bytes: int
    device_memory_bytes: int
    disk_bytes: int
    disk_missing_bytes: int
    seconds: float
    problems: tuple[str, ...]
    fits: bool


def measure_machine(folder: Path = Path()) -> Machine:
    """Look at this machine; ``folder`` lies on the disk that is written to."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # no limit
    found = hardware()
    return Machine(
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        device_memory_free_bytes=torch.cuda.mem_get_info()[0] if found["gpu"] else 0,
        processor=found["processor"],
        gpu=found["gpu"] or "",
    )


def make_row(
    stage: str,
    name: str,
    need: Need,
    machine: Machine,
    records: Sequence[Record],
    kind: tuple[str, str],
    *,
    present: bool = False,
) -> PlanRow:
    """Compare what a stage needs with the machine; ``kind`` is that of its records."""
    if not machine.gpu:
        need = replace(need, host_bytes=need.host_bytes + need.device_bytes, device_bytes=0)
    remedy = "use a smaller model"
    remedy += REMEDIES.get("evaluate" if stage.startswith("evaluate") else stage, "")
    written = 0 if present else need.artifact.num_bytes + need.scratch_bytes
    problems = tuple(
        f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free, "
        f"{(needed - free) / 1e9:.1f} GB too much; {advice}"
        for what, needed, free, advice in (
            ("memory", need.host_bytes, machine.memory_available_bytes, remedy),
            ("GPU memory", need.device_bytes, machine.device_memory_free_bytes, remedy),
            ("disk", written, machine.disk_free_bytes, "free some disk"),
        )
        if needed > free
    )
    time = estimate_time(records, kind, need.work, (machine.processor, machine.gpu))
    return PlanRow(stage, name, need, time, present, problems)


def summarize(rows: Sequence[PlanRow], machine: Machine) -> Plan:
    """Add rows up and compare all missing artifacts together with the free disk."""
    known = [(row, row.need) for row in rows if row.need]
    missing = [need for row, need in known if not row.present]
    scratch = max((need.scratch_bytes for need in missing), default=0)
    disk_missing = sum(need.artifact.num_bytes for need in missing) + scratch
    over = disk_missing - machine.disk_free_bytes
    fits = not any(row.problems for row, _ in known)
    text = f"disk: all artifacts together need {over / 1e9:.1f} GB more than are free; "
    return Plan(
        rows=tuple(rows),
        machine=machine,
        memory_bytes=max((need.host_bytes for _, need in known), default=0),
        device_memory_bytes=max((need.device_bytes for _, need in known), default=0),
        disk_bytes=sum(need.artifact.num_bytes for _, need in known),
        disk_missing_bytes=disk_missing,
        seconds=sum(row.time.seconds for row, _ in known if row.time),
        problems=(text + "free some disk, or leave some runs out",) if over > 0 and fits else (),
        fits=fits and over <= 0,
    )
