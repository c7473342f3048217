"""A row of the plan for every stage instance of params.yaml, and the records it left.

Stages that fetch something and the report are left out: what is downloaded is not known before,
and the report takes seconds. A model that is not there yet gives rows that say how to get it.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.settings import read_run
from llmpress.core.artifacts import PROVENANCE, read_json
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.kinds import KINDS
from llmpress.core.params import build, section, suggestion
from llmpress.data.tasks.files import TASK_FILE, TEST_FILE, TRAIN_FILE
from llmpress.deltas.settings import read_delta, read_delta_run
from llmpress.evaluation.settings import EvaluationSettings, read_evaluation
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.planning import stages
from llmpress.planning.plan import Machine, Plan, PlanRow, make_row, summarize
from llmpress.planning.records import Record, read_records
from llmpress.planning.shapes import ModelShapes, read_shapes
from llmpress.planning.sizes import Layers, planned_layers
from llmpress.planning.stages import Need, TaskText
from llmpress.training.settings import FinetuningSettings, TrainingSettings, read_training
from llmpress.tuning.settings import read_finetune

CHARACTERS_PER_TOKEN = 4.2

Key = tuple[str, str]
"""Stage and name; of records stage and method."""

SECTIONS = {
    "train_task": ("finetuned_models", "data/models"),
    "extract_delta": ("deltas", "data/deltas"),
    "calibrate": ("calibrations", "data/calibration"),
    "compress": ("runs", "data/compressed"),
    "compress_delta": ("delta_runs", "data/compressed"),
    "finetune": ("finetunes", "data/finetuned"),
    "train": ("trainings", "data/trained"),
}
"""Of each stage the section of params.yaml, and the folder of its artifacts."""

EVALUATIONS = {kind.made_by: kind.evaluated_by for kind in KINDS if kind.original}


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
    known = {name for _, name in project.tasks}
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is nothing to plan{suggestion(name, known)}")
    wanted = [key for key in project.tasks if not names or key[1] in names]
    for key in wanted:  # grows
        made_from = project.tasks[key].made_from
        wanted += [other for other in made_from if other in project.tasks and other not in wanted]
    records = read_records() + project_records(params, root)
    rows = [project.row(key, machine, records) for key in project.tasks if key in wanted]
    return summarize(rows, machine)


def project_records(params: Mapping[str, Any], root: Path) -> list[Record]:
    """Return how long the finished stages of a project took, with the settings they had then."""
    project, records = _Project(params, None, root), []
    for key in project.tasks:
        with suppress(ArtifactError, ConfigError, KeyError, ValueError):  # not there, or too old
            records.append(project.record(key))
    return records


@dataclass(frozen=True)
class _Task:
    """A stage instance.

    Attributes:
        kind: Stage and method of its records.
        model: Whose shapes it depends on.
        settings: What else it depends on and its provenance holds; None for a stage without.
        need: Computes what it needs from both.
        made_from: Stages and names of what it is made from.
        method: Of the layers in its artifact.
    """

    kind: Key
    model: str
    settings: Any
    need: Callable[[ModelShapes, Any], Need]
    made_from: tuple[Key, ...]
    method: Method | None = None

    def layers(self, layout: ModelShapes) -> Layers:
        """Return the compressed layers of its artifact; models and adapters have none."""
        return planned_layers(layout, self.method) if self.method else {}


class _Project:
    """params.yaml as stages in the order of dvc.yaml, with each model's layout read once."""

    def __init__(self, params: Mapping[str, Any], model: ModelShapes | None, root: Path) -> None:
        self.params, self.model, self.root = params, model, root
        self.layout, self.text = cache(self._layout), cache(self._text)
        self.tasks: dict[Key, _Task] = {}
        for stage, (group, _) in SECTIONS.items():
            for name in map(str, params.get(group) or {}):
                self.tasks[stage, name] = getattr(self, f"_{stage}")(name)
        if "evaluation" in params:
            models = [("train_task", str(name)) for name in section(params, "evaluation.models")]
            for _, name in models:
                self.tasks["reference", name] = self._reference(name)
            for stage, name in [*models, *(key for key in self.tasks if key[0] in EVALUATIONS)]:
                evaluation = EVALUATIONS.get(stage, "evaluate_model")
                self.tasks[evaluation, name] = self._evaluate(stage, name)

    def row(self, key: Key, machine: Machine, records: Sequence[Record]) -> PlanRow:
        """Estimate one stage instance, or say why that is not possible yet."""
        task = self.tasks[key]
        try:
            need = task.need(self.layout(task.model), task.settings)
        except ArtifactError as error:
            return PlanRow(*key, need=None, problems=(str(error),))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{' '.join(key)}: {error}") from None
        present = self.model is None and self._provenance(key).exists()
        return make_row(*key, need, machine, records, task.kind, present=present)

    def record(self, key: Key) -> Record:
        """Return how long a finished stage took.

        Raises:
            ArtifactError: It is not finished.
            ConfigError: It was made by another method than params.yaml says now.
        """
        task = self.tasks[key]
        made = read_json(self._provenance(key))
        if task.kind[0] == "evaluate":
            about, made = made["evaluation"], made["provenance"]["evaluation"]
            then = {"tasks": about["task_items"], "corpora": list(about["tokens_scored"]), **about}
            seconds = made["seconds"]["all"]
        else:
            then, seconds = made["settings"], made["seconds"]
        method, settings = task.kind[1], task.settings
        if then.get("trains", then.get("method", method)) != method:
            raise ConfigError(f"{' '.join(key)}: was made by another method")
        if settings is not None:
            now = {f.name: getattr(settings, f.name) for f in fields(settings)}
            values = {name: then.get(name, value) for name, value in now.items()}
            settings = build(type(settings), values, " ".join(key))
        hardware = made["hardware"]
        return Record(
            *task.kind,
            model=task.model,
            work=task.need(self.layout(task.model), settings).work,
            seconds=seconds,
            processor=hardware["processor"],
            gpu=hardware["gpu"] or "",
            threads=hardware["threads"],
            date=made["created"][:10],
        )

    def _provenance(self, key: Key) -> Path:
        if key[0] == "reference":
            return self.root / "data/references" / key[1] / PROVENANCE
        if key[0] in SECTIONS:
            return self.root / SECTIONS[key[0]][1] / key[1] / PROVENANCE
        return self.root / "results/details" / f"{key[1]}.json"

    def _layout(self, name: str) -> ModelShapes:
        if self.model is not None:
            return self.model
        folder = self.root / "data/models" / name
        if (folder / "config.json").is_file():
            return read_shapes(folder)
        trained = (self.params.get("finetuned_models") or {}).get(name)
        if trained is not None:
            return self.layout(str(trained["base"])).stored_as(torch.float32)
        source = section(self.params, f"models.{name}")
        if "path" in source and "file" not in source and Path(source["path"]).is_dir():
            return read_shapes(Path(source["path"]))
        raise ArtifactError(f"fetch the model first: python workflow/scripts/fetch_model.py {name}")

    def _text(self, task: str, split: str, drawn: int | None = None) -> TaskText:
        """Return the tokens of a task's items, guessed where the task is not there yet."""
        folder = self.root / "data/tasks" / task
        if not (folder / split).is_file():
            generator = (self.params.get("tasks") or {}).get(task, {}).get("generator")
            return TaskText(45, 70, 32) if generator else TaskText()
        lines = (folder / split).read_text(encoding="utf-8").splitlines()
        config = yaml.safe_load((folder / TASK_FILE).read_text(encoding="utf-8"))
        generates = config.get("output_type") == "generate_until"
        tokens = config.get("generation_kwargs", {}).get("max_gen_toks", 256) if generates else 0
        return task_text([json.loads(line) for line in lines if line.strip()], tokens, drawn)

    def _settings(self, cls: type, where: str) -> Any:
        return build(cls, section(self.params, where), where)

    def _exact_tensors(self, name: str) -> Collection[str]:
        """Return what fine-tuning changes outside the linears: as known, or at most everything."""
        header = self.root / "data/deltas" / name / HEADER
        if self.model is None and header.is_file():
            return list(read_json(header)["exact"])
        finetuned = read_delta(self.params, name).finetuned
        if finetuned in (self.params.get("finetuned_models") or {}):
            return ()  # train_task leaves everything else alone, but for rows of added tokens
        layout = self.layout(finetuned)
        return set(layout.tensors) - {f"{linear}.weight" for linear in layout.linears}

    def _train_task(self, name: str) -> _Task:
        settings = self._settings(TrainingSettings, f"finetuned_models.{name}")

        def need(layout: ModelShapes, settings: TrainingSettings) -> Need:
            text = self.text(settings.task, TRAIN_FILE) if settings.task else TaskText()
            return stages.train_task(layout, settings, text)

        return _Task(("train_task", ""), settings.base, settings, need, ())

    def _extract_delta(self, name: str) -> _Task:
        delta = read_delta(self.params, name)

        def need(layout: ModelShapes, _: None) -> Need:
            return stages.extract_delta(layout, self._exact_tensors(name))

        made_from = (("train_task", delta.finetuned), _maker(delta.base))
        return _Task(("extract_delta", ""), delta.finetuned, None, need, made_from)

    def _calibrate(self, name: str) -> _Task:
        settings = self._settings(CalibrationSettings, f"calibrations.{name}")
        made_from = (("train_task", name),)
        return _Task(("calibrate", ""), name, settings, stages.calibrate, made_from)

    def _compress(self, name: str) -> _Task:
        run = read_run(self.params, name)
        method = build_method(run.method, run.settings, f"runs.{name}")
        kind, made_from = ("compress", run.method), (("calibrate", run.model),)
        return _Task(kind, run.model, method, stages.compress, made_from, method)

    def _compress_delta(self, name: str) -> _Task:
        run = read_delta_run(self.params, name)
        method = build_method(run.method, run.settings, f"delta_runs.{name}")
        calibration = ("calibrate", run.finetuned)
        order = self.tasks[calibration].settings if run.sequential else None

        def need(layout: ModelShapes, method: Method) -> Need:
            return stages.compress_delta(layout, method, self._exact_tensors(run.delta), order)

        made_from = (("extract_delta", run.delta), calibration)
        return _Task(("compress", run.method), run.finetuned, method, need, made_from, method)

    def _finetune(self, name: str) -> _Task:
        finetune = read_finetune(self.params, name)
        start = self.tasks["compress", finetune.run]
        texts = self._settings(CalibrationSettings, f"calibrations.{finetune.model}")
        return _Task(
            ("finetune", finetune.method),
            finetune.model,
            finetune.settings,
            lambda layout, settings: stages.finetune(layout, start.settings, settings, texts),
            (("compress", finetune.run),),
            start.method,
        )

    def _train(self, name: str) -> _Task:
        training = read_training(self.params, name)
        maker = _maker(training.start, delta=training.trains == "delta")
        start = self.tasks.get(maker)  # a fetched model has none

        def need(layout: ModelShapes, settings: FinetuningSettings) -> Need:
            text = self.text(training.task, TRAIN_FILE) if training.task else None
            layers = start.layers(layout) if start else {}
            return stages.train(layout, training.trains, settings, text, layers)

        kind, method = ("train", training.trains), start.method if start else None
        return _Task(kind, training.model, training.settings, need, (maker,), method)

    def _reference(self, name: str) -> _Task:
        settings = read_evaluation(self.params)
        return _Task(("reference", ""), name, settings, stages.reference, (("train_task", name),))

    def _evaluate(self, stage: str, name: str) -> _Task:
        made = self.tasks[stage, name] if stage in EVALUATIONS else None
        original = made.model if made else name
        settings = read_evaluation(self.params)
        settings = replace(settings, tasks=settings.tasks_of(original), own_tasks={})

        def need(layout: ModelShapes, settings: EvaluationSettings) -> Need:
            texts = {n: self.text(n, TEST_FILE, few) for n, few in settings.tasks.items()}
            layers, delta = made.layers(layout) if made else None, stage == "compress_delta"
            return stages.evaluate(layout, settings, texts, layers, delta=delta)

        return _Task(
            ("evaluate", ""), original, settings, need, ((stage, name), ("reference", original))
        )


def _maker(folder: str, *, delta: bool = False) -> Key:
    """Return stage and name of what makes a folder below data/."""
    kind, _, name = folder.partition("/")
    compressed = "compress_delta" if delta else "compress"
    makers = {"models": "train_task", "compressed": compressed, "finetuned": "finetune"}
    return makers[kind], name


def task_text(
    items: Sequence[Mapping[str, Any]], generated: int = 0, drawn: int | None = None
) -> TaskText:
    """Measure items with a ``query`` and either ``choices`` or a ``target``.

    A token is taken for 4.2 characters, as in English, but every digit for one of its own.

    Args:
        items: At least one.
        generated: Tokens that each lets a model generate.
        drawn: How many of them will be drawn at random, of which the longest is shorter.
    """

    def num_tokens(text: str) -> float:
        digits = sum(map(str.isdigit, text))
        return digits + (len(text) - digits) / CHARACTERS_PER_TOKEN

    lengths = sorted(
        num_tokens(item.get("query", "") + str(answer))
        for item in items
        for answer in item.get("choices") or [item.get("target", "")]
    )
    beyond = len(lengths) // (2 * drawn) if drawn else 0  # of twice as many items, one
    return TaskText(sum(lengths) / len(items), lengths[-1 - beyond], generated, len(items))
