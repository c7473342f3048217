"""Everything that params.yaml may say, and the check that its parts fit together."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.settings import Run
from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KINDS, SECTIONS_OF_FOLDER
from llmpress.core.params import build, suggestion
from llmpress.core.settings import FolderOf, Model, Name, NameOf, Natural, Settings
from llmpress.data.documents import CorpusSource
from llmpress.data.sources.pretrained import ModelSource
from llmpress.data.tasks.source import TaskSource
from llmpress.deltas.settings import DeltaRun, DeltaSource, read_delta_run
from llmpress.evaluation.settings import Evaluation, SpeedSettings
from llmpress.methods.registry import build_method
from llmpress.pipeline.peers import Peer
from llmpress.training.settings import Training, TrainingSettings, read_training
from llmpress.tuning.settings import Finetune, read_finetune


@dataclass(frozen=True)
class Params(Settings):
    """Every experiment knob of the pipeline; a section that would be empty may be left out.

    Attributes:
        seed: Seed of everything random.
        models: Models to open, by name; each has exactly one of package, hub and path.
        corpora: Texts, each cut into calibration, validation and test parts that never overlap.
        evaluation: How everything is measured; the same for every model and run.
        tasks: lm-eval tasks, published multiple-choice sets or generated ones.
        finetuned_models: Models that the pipeline fine-tunes itself, by the name the result gets.
        deltas: Deltas to extract, by name.
        calibrations: Token windows and statistics of layer inputs, by the name of their model.
        runs: Compressions of a model, by name.
        delta_runs: Compressions of a delta, by name.
        finetunes: Block-wise finetunings of a compressed model, by name.
        trainings: End-to-end finetunings of a compressed model or delta, or of adapters beside a
            dense one, by name.
        peers: Compressions of a model by other tools, by name.
        speed: Which runs are timed, and how.
    """

    seed: Natural
    models: Mapping[Name, ModelSource]
    corpora: Mapping[Name, CorpusSource]
    evaluation: Evaluation
    tasks: Mapping[Name, TaskSource] = field(default_factory=dict)
    finetuned_models: Mapping[Name, TrainingSettings] = field(default_factory=dict)
    deltas: Mapping[Name, DeltaSource] = field(default_factory=dict)
    calibrations: Mapping[Model, CalibrationSettings] = field(default_factory=dict)
    runs: Mapping[Name, Run] = field(default_factory=dict)
    delta_runs: Mapping[Name, DeltaRun] = field(default_factory=dict)
    finetunes: Mapping[Name, Finetune] = field(default_factory=dict)
    trainings: Mapping[Name, Training] = field(default_factory=dict)
    peers: Mapping[Name, Peer] = field(default_factory=dict)
    speed: SpeedSettings = field(default_factory=SpeedSettings)


def check_params(params: Mapping[str, Any]) -> Params:
    """Check all of params.yaml and return it as one object.

    Raises:
        ConfigError: A key that is unknown or missing, a value that is not allowed, or a name that
            no section has; in one line.
    """
    checked = build(Params, params, "")
    for where, name, sections in _references(Params, checked, ""):
        known = [key for section in sections for key in getattr(checked, section)]
        if name not in known:
            raise ConfigError(
                f"{where}: {' and '.join(sections)} have no {name!r}{suggestion(name, known)}"
            )
    names: dict[str, str] = {}
    for kind in KINDS:
        for name in kind.entries(params):
            if name in names:
                raise ConfigError(
                    f"{kind.section}: {name!r} stands in {names[name]} too: rename it"
                )
            names[name] = kind.section
    for kind in KINDS:
        for key, entry in kind.entries(params).items():
            original = entry[kind.original] if kind.original else key
            if original not in checked.evaluation.models:
                raise ConfigError(
                    f"{kind.section}.{key} is compared with {original!r}: name it in "
                    "evaluation.models too"
                )
    for key, run in checked.runs.items():
        build_method(run.method, run.settings, f"runs.{key}")
    for key in checked.delta_runs:
        delta_run = read_delta_run(params, key)
        build_method(delta_run.method, delta_run.settings, f"delta_runs.{key}")
    for key in checked.finetunes:
        read_finetune(params, key)
    for key in checked.trainings:
        read_training(params, key)
    return checked


def _references(hint: Any, value: Any, where: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield where a name stands, the name, and the sections of which one must have it."""
    while notes := getattr(hint, "__metadata__", ()):  # of Annotated
        for note in notes:
            if isinstance(note, NameOf):
                yield where, value, note.sections
            elif isinstance(note, FolderOf):
                folder, _, name = value.partition("/")
                yield where, name, SECTIONS_OF_FOLDER[folder]
        hint = hint.__origin__
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=True)
        for name, of in hints.items():
            yield from _references(of, getattr(value, name), f"{where}.{name}".lstrip("."))
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            yield from _references(arguments[0], key, where)
            yield from _references(arguments[1], item, f"{where}.{key}")
    elif isinstance(value, tuple):
        for item in value:
            yield from _references(arguments[0], item, where)
    elif value is not None:  # X | None
        for argument in arguments:
            if not isinstance(argument, str):  # of a Literal
                yield from _references(argument, value, where)
