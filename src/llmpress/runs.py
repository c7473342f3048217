"""What params.yaml says of runs: a model or delta, a method, the method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmpress.config import build
from llmpress.config import section as lookup
from llmpress.errors import ConfigError
from llmpress.methods import method_class
from llmpress.methods.base import Method
from llmpress.tuning import TuningSettings


@dataclass(frozen=True)
class Run:
    """One entry of ``runs``.

    Attributes:
        model: Name of the model whose weights are compressed.
        method: Name of a file in ``llmpress.methods``.
        settings: The method's settings.
    """

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeltaRun:
    """One entry of ``delta_runs``.

    Attributes:
        base: Name of the model the fine-tuned one started from.
        finetuned: Name of the fine-tuned model; the delta has the same name.
        method: Name of a file in ``llmpress.methods``.
        settings: The method's settings.
    """

    base: str
    finetuned: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_run(params: Mapping[str, Any], key: str) -> Run:
    """Return run ``key`` of params.yaml, checked."""
    return build(Run, lookup(params, f"runs.{key}"), f"runs.{key}")


def read_delta_run(params: Mapping[str, Any], key: str) -> DeltaRun:
    """Return delta run ``key`` of params.yaml, checked."""
    return build(DeltaRun, lookup(params, f"delta_runs.{key}"), f"delta_runs.{key}")


def known_method(name: str, where: str) -> type[Method]:
    """Return the class of the method ``name``.

    Raises:
        ConfigError: An unknown method; names the nearest known one.
    """
    try:
        return method_class(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def build_method(
    name: str, settings: Mapping[str, Any], where: str, *, section: str | None = None
) -> Method:
    """Return the method ``name`` with its settings checked.

    Args:
        name: Name of a file in ``llmpress.methods``.
        settings: Its settings.
        where: Dotted name of the run, for messages; of the method itself with ``section``.
        section: What the settings are called in messages, ``<where>.settings`` by default.

    Raises:
        ConfigError: An unknown method, or settings it does not take.
    """
    cls = known_method(name, f"{where}.method" if section is None else where)
    return build(cls, settings, f"{where}.settings" if section is None else section)


@dataclass(frozen=True)
class Finetune:
    """One entry of ``finetunes``.

    Attributes:
        run: The run whose compressed model is finetuned.
        model: The model that run compressed: the teacher.
        method: The method of that run; dvc.yaml needs it here, to depend on the method's file.
        settings: Optimiser settings.
    """

    run: str
    model: str
    method: str
    settings: TuningSettings


def read_finetune(params: Mapping[str, Any], key: str) -> Finetune:
    """Return finetune ``key`` of params.yaml, checked.

    Raises:
        ConfigError: Its model or method is not that of its run.
    """
    finetune = build(Finetune, lookup(params, f"finetunes.{key}"), f"finetunes.{key}")
    run = read_run(params, finetune.run)
    for name in ("model", "method"):
        ours, theirs = getattr(finetune, name), getattr(run, name)
        if ours != theirs:
            raise ConfigError(
                f"finetunes.{key}.{name} is {ours!r}, but run {finetune.run!r} has {theirs!r}"
            )
    return finetune
