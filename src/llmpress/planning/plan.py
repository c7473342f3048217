"""What the stages of a project need and how long they take, compared with a machine.

A row for every stage of dvc.yaml but those that fetch something, as what is downloaded is not known
before, and the report, which takes seconds. A model that is not there yet gives rows that say how
to get it.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch
import yaml

from llmpress.core.artifacts import PROVENANCE, read_json
from llmpress.core.environment import hardware
from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.core.kinds import KINDS, Kind
from llmpress.core.params import build, suggestion
from llmpress.data.tasks.files import TASK_FILE, TEST_FILE, TRAIN_FILE, read_items
from llmpress.evaluation.tasks import GENERATION
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method, method_name
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.pipeline.jobs import Job, read_jobs
from llmpress.pipeline.params import check_params
from llmpress.planning import stages
from llmpress.planning.records import Record, Time, estimate_time, read_records
from llmpress.planning.shapes import ModelShapes, read_shapes
from llmpress.planning.stages import Need, TaskText
from llmpress.training.settings import Training, TrainingSettings

CGROUP = Path("/sys/fs/cgroup")
CHARACTERS_PER_TOKEN = 4.2
LOWERED = ("batch_size", "windows", "length")
"""Settings that memory grows with."""


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


@dataclass(frozen=True)
class _Task:
    """What a stage does: a function of a model's shapes and of its settings, as provenance has."""

    model: str
    settings: Any
    need: Callable[[ModelShapes, Any], Need]
    method: str = ""  # that its seconds depend on, or what it trains


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


def plan_project(
    params: Mapping[str, Any],
    machine: Machine,
    *,
    names: Sequence[str] = (),
    model: ModelShapes | None = None,
    root: Path = Path(),
) -> Plan:
    """Plan the stages of a params.yaml.

    Args:
        params: Its content.
        machine: What the plan is compared with.
        names: Runs, delta runs, finetunes or models to plan with all they are made from; all by
            default.
        model: Layout that stands for every model, instead of those of data/models.
        root: The folder of dvc.yaml, whose finished stages tell how long others take.

    Raises:
        ConfigError: An unknown name, a mistake in params.yaml, or a budget that cannot be met.
    """
    project = _Project(params, model, root)
    known = {job.key for job in project.tasks} - {""}
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is nothing to plan{suggestion(name, known)}")
    wanted = [job for job in project.tasks if not names or job.key in names]
    for job in wanted:  # grows
        wanted += [other for other in project.tasks if job.reads(other) and other not in wanted]
    records = read_records() + project_records(params, root)
    rows = [project.row(job, machine, records) for job in project.tasks if job in wanted]
    return _summarize(rows, machine)


def plan_compression(name: str, method: Method, model: ModelShapes, machine: Machine) -> Plan:
    """Plan one compression of a model called ``name``; raises as `plan_project` does."""
    task = _Task(name, method, stages.compress, method_name(method))
    row = _row(Job("compress", name, (), ()), task, model, machine, read_records(), present=False)
    return _summarize([row], machine)


def project_records(params: Mapping[str, Any], root: Path) -> list[Record]:
    """Return how long the finished stages of a project took, with the settings they had then."""
    project, records = _Project(params, None, root), list[Record]()
    for job in project.tasks:
        with suppress(ArtifactError, ConfigError, LookupError, ValueError):  # absent, or too old
            records += project.records(job)
    return records


class _Project:
    """A project's stages, with each model's layout read once."""

    def __init__(self, params: Mapping[str, Any], model: ModelShapes | None, root: Path) -> None:
        self.params, self.model, self.root = check_params(params), model, root
        self.layout = cache(self._layout)
        self.made: dict[str, tuple[Kind, str, Method | None]] = {}  # with its original
        for kind in KINDS:
            for name, entry in kind.entries(params).items():
                start = self.made.get(entry.get(kind.start or "", "").rpartition("/")[2])
                method = start[2] if start else None
                if "method" in entry and not start:
                    method = build_method(entry["method"], entry.get("settings", {}))
                self.made[name] = kind, entry.get(kind.original or "", name), method
        jobs = read_jobs(root / "dvc.yaml", params)
        if not jobs:
            raise ConfigError(f"{root}: no dvc.yaml here; go to the project, or give a --method")
        tasks = ((job, self._task(job)) for job in jobs)
        self.tasks = {job: task for job, task in tasks if task}

    def row(self, job: Job, machine: Machine, records: Sequence[Record]) -> PlanRow:
        """Return a row, or one that says why nothing is known yet."""
        task = self.tasks[job]
        try:
            layout = self.layout(task.model)
        except (ArtifactError, SourceError) as error:
            return PlanRow(job.stage, job.key, None, problems=(str(error),))
        present = self.model is None and all((self.root / out).exists() for out in job.outputs)
        return _row(job, task, layout, machine, records, present=present)

    def records(self, job: Job) -> Iterator[Record]:
        """Yield how long a finished stage took; nothing if another method made it."""
        task, file = self.tasks[job], self.root / job.outputs[0]
        made = read_json(file / PROVENANCE if file.is_dir() else file)
        if file.suffix:  # an evaluation
            about, made = made["evaluation"], made["provenance"]["evaluation"]
            then = {"tasks": about["task_items"], "corpora": list(about["tokens_scored"]), **about}
            seconds = made["seconds"]["all"]
        else:
            then, seconds = made["settings"], made["seconds"]
        if then.get("trains", then.get("method", task.method)) == task.method:
            settings, hardware = task.settings, made["hardware"]
            if settings:
                values = {key: then.get(key, now) for key, now in vars(settings).items()}
                settings = build(type(settings), values, str(job))
            work = task.need(self.layout(task.model), settings).work
            machine = hardware["processor"], hardware["gpu"] or "", hardware["threads"]
            yield Record(job.verb, task.method, task.model, work, seconds, *machine)

    def _task(self, job: Job) -> _Task | None:
        """Return what a job does; None where that needs no plan."""
        params, name = self.params, job.key
        kind, model, method = self.made.get(name, (None, name, None))
        match job.stage:
            case "train_task":
                how = params.finetuned_models[name]
                need = partial(stages.train, trains="model", text=self._items(how), method=None)
                return _Task(how.base, how, need)
            case "extract_delta":
                need = partial(stages.extract_delta, exact_tensors=self._exact_tensors(name))
                return _Task(params.deltas[name].finetuned, None, need)
            case "calibrate":
                return _Task(name, params.calibrations[name], stages.calibrate)
            case "reference":
                return _Task(name, params.evaluation, stages.reference)
            case "compress" if method:
                return _Task(model, method, stages.compress, method_name(method))
            case "compress_delta" if method:
                run = params.delta_runs[name]
                order = params.calibrations[model] if run.sequential else None
                exact = self._exact_tensors(run.delta)
                need = partial(stages.compress_delta, exact_tensors=exact, sequential=order)
                return _Task(model, method, need, method_name(method))
            case "finetune" if method:
                order = params.calibrations[model]
                need = partial(stages.finetune, method=method, calibration=order)
                return _Task(model, params.finetunes[name].settings, need, method_name(method))
            case "train":
                on = params.trainings[name]
                text = self._items(on)
                need = partial(stages.train, trains=on.trains, text=text, method=method)
                return _Task(model, on.settings, need, on.trains)
            case "speed" if params.speed.runs:
                timed = [self.made[run][1:] for run in params.speed.runs]
                return _Task(
                    timed[0][0],
                    params.speed,
                    lambda _, settings: stages.speed(
                        [(self.layout(model), method) for model, method in timed], settings
                    ),
                )
        if kind is None or job.stage != kind.evaluated_by:
            return None
        tasks = params.evaluation.tasks_of(model)
        settings = replace(params.evaluation, tasks=tasks, own_tasks={})
        texts = {task: self._text(task, TEST_FILE) for task in tasks}
        need = partial(stages.evaluate, texts=texts, kind=kind.name, method=method)
        return _Task(model, settings, need)

    def _layout(self, name: str) -> ModelShapes:
        if self.model is not None:
            return self.model
        folder = self.root / "data/models" / name
        if (folder / "config.json").is_file():
            return read_shapes(folder)
        if name in self.params.finetuned_models:
            return self.layout(self.params.finetuned_models[name].base).stored_as(torch.float32)
        source = self.params.models[name]
        if source.path and not source.file and Path(source.path).is_dir():
            return read_shapes(Path(source.path))
        raise ArtifactError(f"fetch the model first: python workflow/scripts/fetch_model.py {name}")

    def _exact_tensors(self, delta: str) -> Collection[str] | None:
        """Return what fine-tuning changed outside the linears; None where it is not known."""
        header = self.root / "data/deltas" / delta / HEADER
        if self.model is None and header.is_file():
            return tuple(read_json(header)["exact"])
        # train_task leaves everything else alone, but for rows of added tokens
        made_here = self.params.deltas[delta].finetuned in self.params.finetuned_models
        return () if made_here else None

    def _items(self, trained: Training | TrainingSettings) -> TaskText | None:
        return self._text(trained.task, TRAIN_FILE) if trained.task else None

    def _text(self, task: str, split: str) -> TaskText:
        """Measure the items of a task, or guess where it is not there yet.

        A token is taken for 4.2 characters, as in English, but every digit for one of its own.
        """
        folder = self.root / "data/tasks" / task
        if not (folder / split).is_file():
            return TaskText(45, 70, 32) if self.params.tasks[task].generator else TaskText()
        items = read_items(folder / split)
        texts = [
            item.get("query", "") + str(answer)
            for item in items
            for answer in item.get("choices") or [item.get("target", "")]
        ]
        digits = [sum(map(str.isdigit, text)) for text in texts]
        lengths = [
            n + (len(t) - n) / CHARACTERS_PER_TOKEN for t, n in zip(texts, digits, strict=True)
        ]
        config = yaml.safe_load((folder / TASK_FILE).read_text(encoding="utf-8"))
        generates = config.get("output_type") == GENERATION
        written = config.get("generation_kwargs", {}).get("max_gen_toks", 256) if generates else 0
        longest = sorted(lengths)[-1 - len(lengths) // 64]  # of as many as are asked
        return TaskText(sum(lengths) / len(items), longest, written, len(items))


def _row(
    job: Job,
    task: _Task,
    model: ModelShapes,
    machine: Machine,
    records: Sequence[Record],
    present: bool = False,
) -> PlanRow:
    """Compare what a job needs with the machine."""
    try:
        need = task.need(model, task.settings)
    except ValueError as error:
        raise ConfigError(f"{job}: {error}") from None
    place = (machine.processor, machine.gpu)
    time = estimate_time(records, (job.verb, task.method), need.work, place)
    if not machine.gpu:
        need = replace(need, host_bytes=need.host_bytes + need.device_bytes, device_bytes=0)
    memory = {
        "memory": (need.host_bytes, machine.memory_available_bytes),
        "GPU memory": (need.device_bytes, machine.device_memory_free_bytes),
    }
    lower = [f"a lower `{name}`" for name in LOWERED if hasattr(task.settings, name)]
    problems = _shortages(memory, " or ".join(["use a smaller model", *lower]))
    written = 0 if present else need.artifact_bytes + need.scratch_bytes
    problems += _shortages({"disk": (written, machine.disk_free_bytes)}, "free some disk")
    return PlanRow(job.stage, job.key, need, time, present, problems)


def _shortages(compared: Mapping[str, tuple[int, int]], remedy: str) -> tuple[str, ...]:
    """Say of which resource more bytes are needed (the first number) than are free."""
    return tuple(
        f"{what}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free, "
        f"{(needed - free) / 1e9:.1f} GB too much; {remedy}"
        for what, (needed, free) in compared.items()
        if needed > free
    )


def _summarize(rows: Sequence[PlanRow], machine: Machine) -> Plan:
    """Add rows up and compare all missing artifacts together with the free disk."""
    needs = [row.need for row in rows if row.need]
    missing = [row.need for row in rows if row.need and not row.present]
    written = sum(need.artifact_bytes for need in missing)
    written += max((need.scratch_bytes for need in missing), default=0)
    fits = not any(row.problems for row in rows if row.need)
    disk = {"disk": (written, machine.disk_free_bytes)} if fits else {}
    problems = _shortages(disk, "free some disk, or leave some runs out")
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
