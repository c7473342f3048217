"""A row of the plan for every stage instance of params.yaml.

Stages that fetch something and the report are left out: what is downloaded is not known before,
and the report takes seconds. A model that is not there yet gives rows that say how to get it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from llmpress.core.artifacts import PROVENANCE, read_json
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.kinds import KINDS
from llmpress.core.params import build, suggestion
from llmpress.data.tasks.files import TASK_FILE, TEST_FILE, TRAIN_FILE, read_items
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method, method_name
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.pipeline.params import check_params
from llmpress.planning import stages
from llmpress.planning.plan import Machine, Plan, PlanRow, shortages, summarize
from llmpress.planning.records import Record, estimate_time, read_records
from llmpress.planning.shapes import ModelShapes, read_shapes
from llmpress.planning.stages import Need, TaskText

CHARACTERS_PER_TOKEN = 4.2
LOWERED = ("batch_size", "windows", "length")
"""Settings that memory grows with."""


@dataclass(frozen=True)
class _Task:
    """A stage instance as params.yaml has it."""

    stage: str  # name in dvc.yaml without its key
    folder: str  # of its artifact below data/, as params.yaml names it; results/NAME of a result
    model: str  # whose shapes it depends on
    settings: Any  # what else it depends on, and its provenance holds
    need: Callable[[ModelShapes, Any], Need]
    made_from: tuple[str, ...] = ()  # folders
    method: str = ""  # that its seconds depend on, or what it trains

    def row(
        self, model: ModelShapes, machine: Machine, records: Sequence[Record], present: bool = False
    ) -> PlanRow:
        """Compare what it needs with the machine."""
        folder, _, name = self.folder.partition("/")
        try:
            need = self.need(model, self.settings)
        except ValueError as error:
            raise ConfigError(f"{self.stage} {name}: {error}") from None
        place = (machine.processor, machine.gpu)
        time = estimate_time(records, (folder, self.method), need.work, place)
        if not machine.gpu:
            need = replace(need, host_bytes=need.host_bytes + need.device_bytes, device_bytes=0)
        memory = {
            "memory": (need.host_bytes, machine.memory_available_bytes),
            "GPU memory": (need.device_bytes, machine.device_memory_free_bytes),
        }
        written = 0 if present else need.artifact_bytes + need.scratch_bytes
        own = [field.name for field in fields(self.settings)] if self.settings else []
        lower = [f"a lower `{setting}`" for setting in own if setting in LOWERED]
        problems = shortages(memory, " or ".join(["use a smaller model", *lower]))
        problems += shortages({"disk": (written, machine.disk_free_bytes)}, "free some disk")
        return PlanRow(self.stage, name, need, time, present, problems)


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
        root: The project's folder, whose finished stages tell how long others take.

    Raises:
        ConfigError: An unknown name, a mistake in params.yaml, or a budget that cannot be met.
    """
    project = _Project(params, model, root)
    tasks = project.tasks
    named = {folder: folder.partition("/")[2] for folder in tasks}
    for name in names:
        if name not in named.values():
            raise ConfigError(f"{name!r} is nothing to plan{suggestion(name, named.values())}")
    wanted = [folder for folder in tasks if not names or named[folder] in names]
    for folder in wanted:  # grows
        wanted += [f for f in tasks[folder].made_from if f in tasks and f not in wanted]
    records = read_records() + project_records(params, root)
    rows = [project.row(folder, machine, records) for folder in tasks if folder in wanted]
    return summarize(rows, machine)


def plan_compression(name: str, method: Method, model: ModelShapes, machine: Machine) -> Plan:
    """Plan one compression of a model called ``name``; raises as `plan_project` does."""
    kind = method_name(method)
    task = _Task("compress", f"compressed/{name}", name, method, stages.compress, method=kind)
    return summarize([task.row(model, machine, read_records())], machine)


def project_records(params: Mapping[str, Any], root: Path) -> list[Record]:
    """Return how long the finished stages of a project took, with the settings they had then."""
    project, records = _Project(params, None, root), []
    for folder in project.tasks:
        with suppress(ArtifactError, ConfigError, KeyError, ValueError):  # not there, or too old
            records += project.records(folder)
    return records


class _Project:
    """params.yaml as stages in the order of dvc.yaml, with each model's layout read once."""

    def __init__(self, params: Mapping[str, Any], model: ModelShapes | None, root: Path) -> None:
        self.content, self.params, self.model, self.root = params, check_params(params), model, root
        self.layout, self.text = cache(self._layout), cache(self._text)
        self.tasks = {task.folder: task for task in self._tasks()}

    def row(self, folder: str, machine: Machine, records: Sequence[Record]) -> PlanRow:
        """Return a row, or one that says why nothing is known yet."""
        task = self.tasks[folder]
        try:
            layout = self.layout(task.model)
        except ArtifactError as error:
            return PlanRow(task.stage, folder.partition("/")[2], None, problems=(str(error),))
        present = self.model is None and self._provenance(folder).exists()
        return task.row(layout, machine, records, present)

    def _provenance(self, folder: str) -> Path:
        kind, _, name = folder.partition("/")
        if kind == "results":
            return self.root / "results/details" / f"{name}.json"
        return self.root / "data" / folder / PROVENANCE

    def records(self, folder: str) -> list[Record]:
        """Return how long a finished stage took; nothing if another method made it."""
        task, made = self.tasks[folder], read_json(self._provenance(folder))
        if folder.startswith("results/"):
            about, made = made["evaluation"], made["provenance"]["evaluation"]
            then = {"tasks": about["task_items"], "corpora": list(about["tokens_scored"]), **about}
            seconds = made["seconds"]["all"]
        else:
            then, seconds = made["settings"], made["seconds"]
        if then.get("trains", then.get("method", task.method)) != task.method:
            return []
        settings, hardware = task.settings, made["hardware"]
        if settings:
            now = {field.name: getattr(settings, field.name) for field in fields(settings)}
            settings = build(type(settings), {k: then.get(k, v) for k, v in now.items()}, folder)
        work = task.need(self.layout(task.model), settings).work
        machine = hardware["processor"], hardware["gpu"] or "", hardware["threads"]
        kind = folder.partition("/")[0]
        return [Record(kind, task.method, task.model, work, seconds, *machine)]

    def _tasks(self) -> Iterator[_Task]:
        params, text, changed = self.params, self.text, self._exact_tensors
        methods: dict[str, Method] = {}  # of the layers in a folder
        for name, how in params.finetuned_models.items():
            items = text(how.task, TRAIN_FILE) if how.task else None
            need = partial(stages.train_task, text=items)
            yield _Task("train_task", f"models/{name}", how.base, how, need)
        for name, delta in params.deltas.items():
            need = partial(stages.extract_delta, exact_tensors=changed(name))
            sources = f"models/{delta.finetuned}", delta.base
            yield _Task("extract_delta", f"deltas/{name}", delta.finetuned, None, need, sources)
        for name, texts in params.calibrations.items():
            source = (f"models/{name}",)
            yield _Task("calibrate", f"calibration/{name}", name, texts, stages.calibrate, source)
        for name, run in params.runs.items():
            folder, source = f"compressed/{name}", (f"calibration/{run.model}",)
            made = methods[folder] = build_method(run.method, run.settings)
            yield _Task("compress", folder, run.model, made, stages.compress, source, run.method)
        for name, of in params.delta_runs.items():
            folder = f"compressed/{name}"
            sources = f"deltas/{of.delta}", f"calibration/{of.finetuned}"
            made = methods[folder] = build_method(of.method, of.settings)
            order = params.calibrations[of.finetuned] if of.sequential else None
            need = partial(stages.compress_delta, exact_tensors=changed(of.delta), sequential=order)
            yield _Task("compress_delta", folder, of.finetuned, made, need, sources, of.method)
        for name, tuned in params.finetunes.items():
            folder, source = f"finetuned/{name}", (f"compressed/{tuned.run}",)
            made = methods[folder] = methods[source[0]]
            texts = params.calibrations[tuned.model]
            need = partial(stages.finetune, method=made, calibration=texts)
            yield _Task("finetune", folder, tuned.model, tuned.settings, need, source, tuned.method)
        for name, on in params.trainings.items():
            folder, start = f"trained/{name}", methods.get(on.start)  # a model has none
            methods |= {folder: start} if start else {}
            items = text(on.task, TRAIN_FILE) if on.task else None
            need = partial(stages.train, trains=on.trains, text=items, method=start)
            yield _Task("train", folder, on.model, on.settings, need, (on.start,), on.trains)
        for name in params.evaluation.models:
            folder, source, measured = f"references/{name}", (f"models/{name}",), params.evaluation
            yield _Task("reference", folder, name, measured, stages.reference, source)
        for kind in KINDS:
            for name, entry in kind.entries(self.content).items():
                folder, original = f"{kind.folder}/{name}", entry.get(kind.original or "", name)
                asked = params.evaluation.tasks_of(original)
                settings = replace(params.evaluation, tasks=asked, own_tasks={})
                need = partial(
                    stages.evaluate,
                    texts={task: text(task, TEST_FILE, few) for task, few in asked.items()},
                    kind=kind.name,
                    method=methods.get(folder),
                )
                stage, sources = kind.evaluated_by, (folder, f"references/{original}")
                yield _Task(stage, f"results/{name}", original, settings, need, sources)

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

    def _text(self, task: str, split: str, drawn: int | None = None) -> TaskText:
        """Measure the items of a task, or guess where it is not there yet.

        A token is taken for 4.2 characters, as in English, but every digit for one of its own. Of
        ``drawn`` items at random the longest is shorter than that of all.
        """
        folder = self.root / "data/tasks" / task
        if not (folder / split).is_file():
            return TaskText(45, 70, 32) if self.params.tasks[task].generator else TaskText()
        items = read_items(folder / split)
        lengths = sorted(
            _num_tokens(item.get("query", "") + str(answer))
            for item in items
            for answer in item.get("choices") or [item.get("target", "")]
        )
        beyond = len(lengths) // (2 * drawn) if drawn else 0  # of twice as many items, one
        config = yaml.safe_load((folder / TASK_FILE).read_text(encoding="utf-8"))
        generates = config.get("output_type") == "generate_until"
        written = config.get("generation_kwargs", {}).get("max_gen_toks", 256) if generates else 0
        return TaskText(sum(lengths) / len(items), lengths[-1 - beyond], written, len(items))


def _num_tokens(text: str) -> float:
    digits = sum(map(str.isdigit, text))
    return digits + (len(text) - digits) / CHARACTERS_PER_TOKEN
