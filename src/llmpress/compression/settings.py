"""What params.yaml says of runs: a model or delta, a method, the method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.core.params import section as lookup
from llmpress.methods import method_class
from llmpress.methods.base import Method
from llmpress.tuning.blocks import TuningSettings


@dataclass(frozen=True)
class Run:
    """One entry of ``runs``.

    Attributes:
        model: Name of the model whose weights are compressed.
        method: Name of a package in ``llmpress.methods``.
        settings: The method's settings.
    """

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeltaSource:
    """One entry of ``deltas``.

    Attributes:
        base: What is subtracted, as its folder below data/: ``models/<model>``, or, for a base that
            is served compressed, ``compressed/<run>`` or ``finetuned/<finetune>``.
        finetuned: Name of the fine-tuned model.
    """

    base: str
    finetuned: str

    def __post_init__(self) -> None:
        check_base(self.base)


@dataclass(frozen=True)
class DeltaRun:
    """One entry of ``delta_runs``.

    Attributes:
        delta: Name of the delta, a key of ``deltas``.
        base: That delta's; dvc.yaml needs it here, to depend on its folder.
        finetuned: That delta's.
        method: Name of a package in ``llmpress.methods``.
        settings: The method's settings.
        sequential: Compress each layer for the inputs that it gets once the layers before it are
            compressed, instead of those of the fine-tuned model.
    """

    delta: str
    base: str
    finetuned: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sequential: bool = False

    def __post_init__(self) -> None:
        check_base(self.base)


def check_base(base: str) -> None:
    """Refuse what is no folder below data/ that holds a model."""
    kind, _, name = base.partition("/")
    if kind not in ("models", "compressed", "finetuned") or not name or "/" in name:
        raise ValueError(
            f"base={base!r}: a folder below data/ is needed: models/NAME, compressed/NAME or "
            "finetuned/NAME"
        )


def read_run(params: Mapping[str, Any], key: str) -> Run:
    """Return run ``key`` of params.yaml, checked."""
    return build(Run, lookup(params, f"runs.{key}"), f"runs.{key}")


def read_delta(params: Mapping[str, Any], key: str) -> DeltaSource:
    """Return delta ``key`` of params.yaml, checked."""
    return build(DeltaSource, lookup(params, f"deltas.{key}"), f"deltas.{key}")


def read_delta_run(params: Mapping[str, Any], key: str) -> DeltaRun:
    """Return delta run ``key`` of params.yaml, checked.

    Raises:
        ConfigError: Its base or fine-tuned model is not that of its delta.
    """
    run = build(DeltaRun, lookup(params, f"delta_runs.{key}"), f"delta_runs.{key}")
    delta = read_delta(params, run.delta)
    _check_same(("base", "finetuned"), f"delta_runs.{key}", run, f"delta {run.delta!r}", delta)
    return run


def _check_same(
    names: tuple[str, ...], where: str, entry: object, other_name: str, other: object
) -> None:
    """Refuse an entry that says another thing than the one it refers to."""
    for name in names:
        ours, theirs = getattr(entry, name), getattr(other, name)
        if ours != theirs:
            raise ConfigError(f"{where}.{name} is {ours!r}, but {other_name} has {theirs!r}")


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
        name: Name of a package in ``llmpress.methods``.
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
    _check_same(("model", "method"), f"finetunes.{key}", finetune, f"run {finetune.run!r}", run)
    return finetune
