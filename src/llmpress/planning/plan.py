"""What the stages of a project need and how long they take, compared with a machine.

A row for every stage of dvc.yaml that makes something of a model. What is fetched is not known
before, and measuring speed and the report take little. A model that is not there yet gives rows
that say how to get it.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from llmpress.core.artifacts import read_json
from llmpress.core.environment import available_memory_bytes, hardware
from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.core.kinds import KINDS
from llmpress.core.params import suggestion
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.pipeline.jobs import Job, read_jobs
from llmpress.pipeline.params import check_params
from llmpress.planning import stages
from llmpress.planning.records import Time, estimate_time, read_records
from llmpress.planning.shapes import ModelShapes, read_shapes
from llmpress.planning.stages import GENERATED_TASK, Need, TaskText

UNPLANNED = ("fetch", "speed", "report")


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
    disk_missing_bytes: int  # of those that are not there yet
    seconds: float  # of all rows with a time, one after another
    problems: tuple[str, ...]  # of all artifacts together
    fits: bool


def measure_machine(folder: Path = Path()) -> Machine:
    """Look at this machine; ``folder`` lies on the disk that is written to."""
    found = hardware()
    return Machine(
        memory_available_bytes=available_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        device_memory_free_bytes=torch.cuda.mem_get_info()[0] if found["gpu"] else 0,
        processor=found["processor"],
        gpu=found["gpu"] or "",
    )


def plan_project(
    params: Mapping[str, Any], machine: Machine, *, names: Sequence[str] = (), root: Path = Path()
) -> Plan:
    """Plan the stages of a params.yaml.

    Args:
        params: Its content.
        machine: What the plan is compared with.
        names: Runs, delta runs, finetunes or models to plan with all they are made from; all by
            default.
        root: The folder of dvc.yaml.

    Raises:
        ConfigError: An unknown name, a mistake in params.yaml, or a budget that cannot be met.
    """
    project = _Project(params, root)
    known = {job.key for job in project.jobs} - {""}
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is nothing to plan{suggestion(name, known)}")
    wanted = [job for job in project.jobs if not names or job.key in names]
    for job in wanted:  # grows
        wanted += [other for other in project.jobs if job.reads(other) and other not in wanted]
    rows = []
    for job in (job for job in project.jobs if job in wanted):
        present = all((root / output).exists() for output in job.outputs)
        rows.append(_row(job, partial(project.need, job), machine, present))
    return _summarize(rows, machine)


def plan_compression(name: str, method: Method, model: ModelShapes, machine: Machine) -> Plan:
    """Plan one compression of a model called ``name``; raises as `plan_project` does."""
    job, need = Job("compress", name, (), ()), partial(stages.compress, model, method)
    return _summarize([_row(job, need, machine, present=False)], machine)


class _Project:
    """A project's stages, with each model's layout read once."""

    def __init__(self, params: Mapping[str, Any], root: Path) -> None:
        self.params, self.root = check_params(params), root
        self.layout = cache(self._layout)
        self.texts: dict[str | None, TaskText] = {
            name: GENERATED_TASK if task.generator else TaskText()
            for name, task in self.params.tasks.items()
        }
        jobs = read_jobs(root / "dvc.yaml", params)
        if not jobs:
            raise ConfigError(f"{root}: no dvc.yaml here; go to the project, or give a --method")
        self.jobs = [job for job in jobs if job.verb not in UNPLANNED]

    def need(self, job: Job) -> Need:
        """Return what a stage needs; an error where a model's layout is not known yet."""
        params, name = self.params, job.key
        original, method = self._made(name)
        match job.stage:
            case "train_task":
                how = params.finetuned_models[name]
                return stages.train(self.layout(how.base), how, "", self.texts.get(how.task))
            case "extract_delta":
                finetuned = self.layout(params.deltas[name].finetuned)
                return stages.extract_delta(finetuned, self._exact(name))
        model = self.layout(original)
        match job.stage:
            case "calibrate":
                return stages.calibrate(model, params.calibrations[name])
            case "reference":
                return stages.reference(model, params.evaluation)
            case "compress" if method:
                return stages.compress(model, method)
            case "compress_delta" if method:
                exact = self._exact(params.delta_runs[name].delta)
                return stages.compress_delta(model, method, exact)
            case "finetune" if method:
                settings, texts = params.finetunes[name].settings, params.calibrations[original]
                return stages.finetune(model, settings, method, texts)
            case "train":
                on = params.trainings[name]
                return stages.train(model, on.settings, on.trains, self.texts.get(on.task), method)
        (kind,) = (kind.name for kind in KINDS if kind.evaluated_by == job.stage)
        asked = replace(params.evaluation, tasks=params.evaluation.tasks_of(original))
        return stages.evaluate(model, asked, self.texts, kind, method)

    def _made(self, name: str) -> tuple[str, Method | None]:
        """Return the original of what a name stands for, and the method of its layers."""
        params = self.params
        if run := params.runs.get(name):
            return run.model, build_method(run.method, run.settings)
        if delta := params.delta_runs.get(name):
            return delta.finetuned, build_method(delta.method, delta.settings)
        if tuned := params.finetunes.get(name):
            return self._made(tuned.run)
        if trained := params.trainings.get(name):
            return trained.model, self._made(trained.start.rpartition("/")[2])[1]
        return name, None

    def _layout(self, name: str) -> ModelShapes:
        folder = self.root / "data/models" / name
        if (folder / "config.json").is_file():
            return read_shapes(folder)
        if name in self.params.finetuned_models:
            return self.layout(self.params.finetuned_models[name].base).stored_as(torch.float32)
        source = self.params.models[name]
        if source.path and not source.file and Path(source.path).is_dir():
            return read_shapes(Path(source.path))
        raise ArtifactError(f"fetch the model first: python workflow/scripts/fetch_model.py {name}")

    def _exact(self, delta: str) -> tuple[str, ...]:
        """Return what fine-tuning changed outside the linears: nothing, while that is not known."""
        header = self.root / "data/deltas" / delta / HEADER
        return tuple(read_json(header)["exact"]) if header.is_file() else ()


def _row(job: Job, needs: Callable[[], Need], machine: Machine, present: bool) -> PlanRow:
    """Compare what a job needs with the machine, or say why nothing is known yet."""
    try:
        need = needs()
    except (ArtifactError, SourceError) as error:
        return PlanRow(job.stage, job.key, None, problems=(str(error),))
    except ValueError as error:
        raise ConfigError(f"{job}: {error}") from None
    place = (machine.processor, machine.gpu)
    time = estimate_time(read_records(), (job.verb, need.by), need.work, place)
    if not machine.gpu:
        need = replace(need, host_bytes=need.host_bytes + need.device_bytes, device_bytes=0)
    remedy = "use a smaller model, or lower `batch_size`, `windows` or `length`"
    problems = _shortage("memory", need.host_bytes, machine.memory_available_bytes, remedy)
    problems += _shortage("GPU memory", need.device_bytes, machine.device_memory_free_bytes, remedy)
    return PlanRow(job.stage, job.key, need, time, present, problems)


def _shortage(what: str, needed: int, free: int, remedy: str) -> tuple[str, ...]:
    """Say of which resource more bytes are needed than are free; nothing where they do."""
    if needed <= free:
        return ()
    much = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    return (f"{what}: {much}, {(needed - free) / 1e9:.1f} GB too much; {remedy}",)


def _summarize(rows: Sequence[PlanRow], machine: Machine) -> Plan:
    """Add rows up and compare all missing artifacts together with the free disk."""
    needs = [row.need for row in rows if row.need]
    missing = sum(row.need.artifact_bytes for row in rows if row.need and not row.present)
    remedy = "free some disk, or leave some runs out"
    problems = _shortage("disk", missing, machine.disk_free_bytes, remedy)
    return Plan(
        rows=tuple(rows),
        machine=machine,
        memory_bytes=max((need.host_bytes for need in needs), default=0),
        device_memory_bytes=max((need.device_bytes for need in needs), default=0),
        disk_bytes=sum(need.artifact_bytes for need in needs),
        disk_missing_bytes=missing,
        seconds=sum(row.time.seconds for row in rows if row.time),
        problems=problems,
        fits=not (problems or any(row.problems for row in rows if row.need)),
    )
