"""From params.yaml to one row per stage instance: what it needs and whether that fits.

Stages that fetch something and the report are left out: what is downloaded is not known before,
and the report takes seconds. A model that is not there yet gives rows that say how to get it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmpress.methods.base import Method
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import costs, stages
from llmpress.planning.estimates import Estimate
from llmpress.planning.machine import Machine
from llmpress.planning.shapes import ModelShapes

Layers = Mapping[str, CompressedLinear | None]

FASTER, SLOWER = 0.5, 2.0
"""A stage is expected to take between these multiples of the estimate. Of the 28 stages of the
default run, which shared two hyperthreads with other work, 27 lie in that range; the other one, a
delta_come compression, took three times as long as its layers take on the idle machine."""

FASTER_ON_DEVICE, SLOWER_ON_DEVICE = 0.3, 4.0
"""The same on a GPU, where the constants were never calibrated."""


REMEDIES = {
    "calibrate": "lower `windows` or `length` of the calibration, or use a smaller model",
    "compress": "use a smaller model, or a method with a smaller work space",
    "compress_delta": "use a smaller model, or a method with a smaller work space",
    "finetune": "lower `batch_size`, or `windows` and `length` of the calibration",
    "train": "lower `batch_size` or `length`, or use a smaller model",
    "train_task": "lower `batch_size`, or use a smaller model",
    "extract_delta": "use a smaller model",
    "evaluate": "use a smaller model, bfloat16 as `dtype`, or a lower `length` of the evaluation",
}


@dataclass(frozen=True)
class PlanRow:
    """One stage instance; every number is an estimate but for exact disk bytes.

    Attributes:
        stage: Name in dvc.yaml without its key.
        name: Its key.
        unknown: Why nothing is known, with what to do; None where the rest holds.
        memory_bytes: Memory of the computer at the peak.
        device_memory_bytes: Memory of the GPU at the peak; 0 without a GPU.
        mapped_bytes: Pages of weight files that show in the resident size on top of
            ``memory_bytes`` and that the system drops when it needs them.
        disk_bytes: The artifact that stays; DVC's cache shares it by a link.
        disk_exact: Whether its tensor files are counted exactly; otherwise the values decide.
        scratch_bytes: Disk used on top until the stage is done.
        seconds: Expected time.
        seconds_low: Lower end of the expected range.
        seconds_high: Upper end.
        present: Whether the artifact lies there already; the engine decides if it is up to date.
        fits: Whether it fits the machine by itself; None where nothing is known.
        problems: What does not fit, by how much, what to lower.
    """

    stage: str
    name: str
    unknown: str | None = None
    memory_bytes: int = 0
    device_memory_bytes: int = 0
    mapped_bytes: int = 0
    disk_bytes: int = 0
    disk_exact: bool = True
    scratch_bytes: int = 0
    seconds: float = 0.0
    seconds_low: float = 0.0
    seconds_high: float = 0.0
    present: bool = False
    fits: bool | None = None
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
        seconds: Of all rows one after another, artifacts that are there included.
        seconds_low: Lower end of the expected range.
        seconds_high: Upper end.
        fits: Whether every row fits, and all missing artifacts together fit the disk.
        problems: Of all artifacts together.
    """

    rows: tuple[PlanRow, ...]
    machine: Machine
    memory_bytes: int = 0
    device_memory_bytes: int = 0
    disk_bytes: int = 0
    disk_missing_bytes: int = 0
    seconds: float = 0.0
    seconds_low: float = 0.0
    seconds_high: float = 0.0
    fits: bool = True
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return asdict(self)


def plan_compression(model: ModelShapes, name: str, method: Method, machine: Machine) -> Plan:
    """Plan one compression without a params.yaml.

    Args:
        model: What is compressed.
        name: What the row is called.
        method: How.
        machine: What the plan is compared with.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    estimate = stages.compress(model, method)
    return summarize([fitted("compress", name, estimate, machine)], machine)


def fitted(
    stage: str, name: str, estimate: Estimate, machine: Machine, *, present: bool = False
) -> PlanRow:
    """Return an estimate as a row, compared with the machine."""
    on_device = machine.device != "cpu"
    memory = estimate.staging_bytes if on_device else estimate.host_bytes
    device = estimate.device_bytes if on_device else 0
    disk = estimate.artifact.num_bytes
    seconds = costs.seconds(estimate.work, machine.rates)
    low, high = (FASTER_ON_DEVICE, SLOWER_ON_DEVICE) if on_device else (FASTER, SLOWER)
    remedy = REMEDIES["evaluate" if stage.startswith("evaluate") else stage]
    needed = [
        ("memory", memory, machine.memory_available_bytes, remedy),
        ("disk", disk + estimate.scratch_bytes, machine.disk_free_bytes, "free some disk"),
    ]
    if machine.device_memory_free_bytes is not None:
        needed.append(("GPU memory", device, machine.device_memory_free_bytes, remedy))
    problems = tuple(
        f"{what}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free, "
        f"{(need - free) / 1e9:.1f} GB too much; {advice}"
        for what, need, free, advice in needed
        if need > free and not (what == "disk" and present)
    )
    return PlanRow(
        stage=stage,
        name=name,
        memory_bytes=memory,
        device_memory_bytes=device,
        mapped_bytes=estimate.mapped_bytes,
        disk_bytes=disk,
        disk_exact=estimate.artifact.exact,
        scratch_bytes=estimate.scratch_bytes,
        seconds=seconds,
        seconds_low=low * seconds,
        seconds_high=high * seconds,
        present=present,
        fits=not problems,
        problems=problems,
    )


def summarize(rows: Sequence[PlanRow], machine: Machine) -> Plan:
    """Add rows up and compare all missing artifacts together with the free disk."""
    missing = [row for row in rows if not row.present]
    scratch = max((row.scratch_bytes for row in missing), default=0)
    disk_missing = sum(row.disk_bytes for row in missing) + scratch
    over = disk_missing - machine.disk_free_bytes
    problems = (
        (
            f"disk: all artifacts together need {over / 1e9:.1f} GB more than are free; "
            "free some disk, or leave some runs out",
        )
        if over > 0 and not any(problem.startswith("disk") for r in rows for problem in r.problems)
        else ()
    )
    return Plan(
        rows=tuple(rows),
        machine=machine,
        memory_bytes=max((row.memory_bytes for row in rows), default=0),
        device_memory_bytes=max((row.device_memory_bytes for row in rows), default=0),
        disk_bytes=sum(row.disk_bytes for row in rows),
        disk_missing_bytes=disk_missing,
        seconds=sum(row.seconds for row in rows),
        seconds_low=sum(row.seconds_low for row in rows),
        seconds_high=sum(row.seconds_high for row in rows),
        fits=over <= 0 and all(row.fits is not False for row in rows),
        problems=problems,
    )
