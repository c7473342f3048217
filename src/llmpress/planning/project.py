"""A row of the plan for every stage instance of params.yaml."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.settings import read_run
from llmpress.core.artifacts import read_json
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.params import build, section, suggestion
from llmpress.deltas.settings import read_delta, read_delta_run
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method
from llmpress.planning import evaluation, stages
from llmpress.planning.estimates import Estimate, TaskText
from llmpress.planning.machine import Machine
from llmpress.planning.plan import Layers, Plan, PlanRow, fitted, summarize
from llmpress.planning.shapes import ModelShapes, read_shapes
from llmpress.planning.sizes import planned_layers
from llmpress.training.full import TrainingSettings
from llmpress.training.settings import Training, read_training
from llmpress.tuning.settings import read_finetune

CHARACTERS_PER_TOKEN = 4.2
"""Of English; every digit is taken for a token of its own."""


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
        root: The project's folder.

    Raises:
        ConfigError: An unknown name, or a mistake in params.yaml.
    """
    project = _Project(params, machine, model, root)
    tasks = project.tasks()
    known = sorted({name for _, name in tasks})
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is nothing to plan{suggestion(name, known)}")
    wanted = [key for key in tasks if not names or key[1] in names]
    closure: set[tuple[str, str]] = set()
    while wanted:
        key = wanted.pop()
        if key in tasks and key not in closure:
            closure.add(key)
            wanted.extend(tasks[key].needs)
    rows = [project.row(key, tasks[key]) for key in tasks if key in closure]
    return summarize(rows, machine)


@dataclass(frozen=True)
class _Task:
    """A stage instance: how it is estimated, what it is made from, where its artifact lies."""

    estimate: Callable[[], Estimate]
    needs: tuple[tuple[str, str], ...]
    folder: Path


@dataclass
class _Project:
    """params.yaml with the layouts of its models, each read once."""

    params: Mapping[str, Any]
    machine: Machine
    model: ModelShapes | None
    root: Path
    _shapes: dict[str, ModelShapes] = field(default_factory=dict)
    _evaluation: EvaluationSettings | None = None
    _answers: dict[tuple[str, int | None], TaskText] = field(default_factory=dict)

    def row(self, key: tuple[str, str], task: _Task) -> PlanRow:
        """Estimate one stage instance, or say why that is not possible yet."""
        stage, name = key
        try:
            estimate = task.estimate()
        except ArtifactError as error:
            return PlanRow(stage, name, unknown=str(error))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{stage} {name}: {error}") from None
        present = self.model is None and (self.root / task.folder).exists()
        return fitted(stage, name, estimate, self.machine, present=present)

    def tasks(self) -> dict[tuple[str, str], _Task]:
        """Return every stage instance in the order of dvc.yaml."""
        groups: tuple[tuple[str, str, Callable[[str], _Task]], ...] = (
            ("finetuned_models", "train_task", self._train_task),
            ("deltas", "extract_delta", self._extract_delta),
            ("calibrations", "calibrate", self._calibrate),
            ("runs", "compress", self._compress),
            ("delta_runs", "compress_delta", self._compress_delta),
            ("finetunes", "finetune", self._finetune),
            ("trainings", "train", self._train),
        )
        tasks = {
            (stage, str(name)): make(str(name))
            for group, stage, make in groups
            for name in self.params.get(group) or {}
        }
        if "evaluation" not in self.params:
            return tasks
        for name in section(self.params, "evaluation.models"):
            tasks["evaluate_model", name] = self._evaluate_model(name)
        for group, stage, made in (
            ("runs", "evaluate", "compress"),
            ("delta_runs", "evaluate_delta", "compress_delta"),
            ("finetunes", "evaluate_finetuned", "finetune"),
            ("trainings", "evaluate_trained", "train"),
        ):
            for name in self.params.get(group) or {}:
                tasks[stage, str(name)] = self._evaluate(str(name), made)
        return tasks

    def _layout(self, name: str) -> ModelShapes:
        """Return the layout of a model of params.yaml.

        Raises:
            ArtifactError: It has to be fetched first.
        """
        if self.model is not None:
            return self.model
        if name not in self._shapes:
            self._shapes[name] = self._read_layout(name)
        return self._shapes[name]

    def _read_layout(self, name: str) -> ModelShapes:
        folder = self.root / "data/models" / name
        if (folder / "config.json").is_file():
            return read_shapes(folder)
        trained = (self.params.get("finetuned_models") or {}).get(name)
        if trained is not None:
            import torch

            return self._layout(str(trained["base"])).stored_as(torch.float32)
        source = section(self.params, f"models.{name}")
        if "path" in source and "file" not in source and Path(source["path"]).is_dir():
            return read_shapes(Path(source["path"]))
        raise ArtifactError(f"fetch the model first: python workflow/scripts/fetch_model.py {name}")

    def _calibration(self, name: str) -> CalibrationSettings:
        where = f"calibrations.{name}"
        return build(CalibrationSettings, section(self.params, where), where)

    def _exact_tensors(self, name: str) -> Collection[str]:
        """Return what fine-tuning changes outside the linears: as known, or at most everything."""
        header = self.root / "data/deltas" / name / "delta.json"
        if self.model is None and header.is_file():
            return list(read_json(header)["exact"])
        finetuned = read_delta(self.params, name).finetuned
        if finetuned in (self.params.get("finetuned_models") or {}):
            return ()  # train_task leaves everything else alone, but for rows of added tokens
        layout = self._layout(finetuned)
        linears = {f"{linear}.weight" for linear in layout.linears}
        return [tensor for tensor in layout.tensors if tensor not in linears]

    def _train_task(self, name: str) -> _Task:
        where = f"finetuned_models.{name}"
        settings = build(TrainingSettings, section(self.params, where), where)
        return _Task(
            lambda: stages.train_task(
                self._layout(settings.base),
                settings.steps,
                settings.batch_size,
                self._text(settings.task, "train.jsonl")
                if settings.task
                else TaskText(settings.windows, settings.length, settings.length, 0),
            ),
            (),
            Path("data/models") / name,
        )

    def _extract_delta(self, name: str) -> _Task:
        delta = read_delta(self.params, name)
        made = {"compressed": "compress", "finetuned": "finetune"}
        kind, _, base = delta.base.partition("/")
        return _Task(
            lambda: stages.extract_delta(self._layout(delta.finetuned), self._exact_tensors(name)),
            (("train_task", delta.finetuned), (made.get(kind, "fetch_model"), base)),
            Path("data/deltas") / name,
        )

    def _calibrate(self, name: str) -> _Task:
        settings = self._calibration(name)
        return _Task(
            lambda: stages.calibrate(self._layout(name), settings),
            (("train_task", name),),
            Path("data/calibration") / name,
        )

    def _compress(self, name: str) -> _Task:
        model, _, method = self._run(name)
        return _Task(
            lambda: stages.compress(self._layout(model), method),
            (("calibrate", model),),
            Path("data/compressed") / name,
        )

    def _compress_delta(self, name: str) -> _Task:
        run = read_delta_run(self.params, name)
        method = build_method(run.method, run.settings, f"delta_runs.{name}")
        return _Task(
            lambda: stages.compress_delta(
                self._layout(run.finetuned),
                method,
                self._exact_tensors(run.delta),
                self._calibration(run.finetuned) if run.sequential else None,
            ),
            (("extract_delta", run.delta), ("calibrate", run.finetuned)),
            Path("data/compressed") / name,
        )

    def _finetune(self, name: str) -> _Task:
        finetune = read_finetune(self.params, name)
        model, method_name, method = self._run(finetune.run)
        return _Task(
            lambda: stages.finetune(
                self._layout(model),
                method_name,
                method,
                finetune.settings,
                self._calibration(model),
            ),
            (("compress", finetune.run),),
            Path("data/finetuned") / name,
        )

    def _train(self, name: str) -> _Task:
        training = read_training(self.params, name)
        start = _start(training)
        layers = self._planned_layers(*start)

        def estimate() -> Estimate:
            layout = self._layout(training.model)
            text = None if training.task is None else self._text(training.task, "train.jsonl")
            return stages.train(layout, training.trains, training.settings, text, layers(layout))

        return _Task(estimate, (start,), Path("data/trained") / name)

    def _run(self, name: str) -> tuple[str, str, Method]:
        """Return model, method's name and method of a run."""
        run = read_run(self.params, name)
        return run.model, run.method, build_method(run.method, run.settings, f"runs.{name}")

    def _planned_layers(self, made: str, name: str) -> Callable[[ModelShapes], Layers]:
        """Return the compressed layers of an artifact by what made it; adapters have none."""
        if made == "train":
            made, name = _start(read_training(self.params, name))
        if made == "train_task":
            return lambda _: {}
        if made == "compress_delta":
            run = read_delta_run(self.params, name)
            method = build_method(run.method, run.settings, f"delta_runs.{name}")
        else:
            of = read_finetune(self.params, name).run if made == "finetune" else name
            _, _, method = self._run(of)
        return lambda layout: planned_layers(layout, method)

    def _evaluation_settings(self) -> EvaluationSettings:
        if self._evaluation is None:
            values = {k: v for k, v in section(self.params, "evaluation").items() if k != "models"}
            self._evaluation = build(EvaluationSettings, values, "evaluation")
        return self._evaluation

    def _asked(self, original: str) -> EvaluationSettings:
        """Return the settings with the tasks of one model, and of all that is compared with it."""
        settings = self._evaluation_settings()
        return replace(settings, tasks=settings.tasks_of(original), own_tasks={})

    def _texts(self, settings: EvaluationSettings) -> dict[str, TaskText]:
        for name, drawn in settings.tasks.items():
            if (name, drawn) not in self._answers:
                self._answers[name, drawn] = self._text(name, "test.jsonl", drawn)
        return {name: self._answers[name, drawn] for name, drawn in settings.tasks.items()}

    def _evaluate_model(self, name: str) -> _Task:
        settings = self._asked(name)
        return _Task(
            lambda: evaluation.evaluate(self._layout(name), settings, self._texts(settings)),
            (("train_task", name),),
            Path("results/metrics") / f"{name}.json",
        )

    def _evaluate(self, name: str, made: str) -> _Task:
        delta = made == "compress_delta"
        read: Callable[..., Any] = {
            "compress": read_run,
            "compress_delta": read_delta_run,
            "finetune": read_finetune,
            "train": read_training,
        }[made]
        entry = read(self.params, name)
        original = entry.finetuned if delta else entry.model
        settings = self._asked(original)
        layers = self._planned_layers(made, name)

        def estimate() -> Estimate:
            layout = self._layout(original)
            return evaluation.evaluate(
                layout, settings, self._texts(settings), layers(layout), delta=delta
            )

        return _Task(estimate, ((made, name),), Path("results/metrics") / f"{name}.json")

    def _text(self, task: str, split: str, drawn: int | None = None) -> TaskText:
        """Return the tokens of a task's items, guessed where the task is not there yet."""
        folder = self.root / "data/tasks" / task
        generator = (self.params.get("tasks") or {}).get(task, {}).get("generator")
        guess = TaskText(1, 45, 70, 32) if generator else TaskText()
        if not (folder / split).is_file():
            return guess
        lines = (folder / split).read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines if line.strip()]
        if not items:
            return guess
        return task_text(items, drawn, _generated_tokens(folder / "task.yaml"))


def _start(training: Training) -> tuple[str, str]:
    """Return stage and key of what makes the start of a training."""
    kind, _, name = training.start.partition("/")
    compressed = "compress_delta" if training.trains == "delta" else "compress"
    made = {"models": "train_task", "compressed": compressed, "finetuned": "finetune"}
    return made[kind], name


def task_text(
    items: Sequence[Mapping[str, Any]], drawn: int | None = None, generated_tokens: int = 0
) -> TaskText:
    """Measure items with a ``query`` and either ``choices`` or a ``target``.

    Args:
        items: At least one.
        drawn: How many of them will be drawn at random; None for all. The longest of a few is
            shorter than the longest of all.
        generated_tokens: Of each item, where answers are generated.
    """
    lengths = sorted(
        _num_tokens(item.get("query", "") + str(answer))
        for item in items
        for answer in item.get("choices") or [item.get("target", "")]
    )
    beyond = 0 if drawn is None else len(items) // (2 * drawn)  # of twice as many items, one
    requests = len(lengths) / len(items)
    return TaskText(
        requests=requests,
        tokens=sum(lengths) / len(lengths),
        longest_tokens=lengths[-1 - min(int(beyond * requests), len(lengths) - 1)],
        generated_tokens=generated_tokens,
        items=len(items),
    )


def _num_tokens(text: str) -> float:
    digits = sum(character.isdigit() for character in text)
    return digits + (len(text) - digits) / CHARACTERS_PER_TOKEN


def _generated_tokens(file: Path) -> int:
    if not file.is_file():
        return 0
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if config.get("output_type") != "generate_until":
        return 0
    return int(config.get("generation_kwargs", {}).get("max_gen_toks", 256))
