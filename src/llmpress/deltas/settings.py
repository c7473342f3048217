"""What params.yaml says of deltas and of their compression."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from llmpress.core.params import build, check_same
from llmpress.core.params import section as lookup
from llmpress.core.settings import FolderOf, Model, NameOf, Settings

Base = Annotated[str, FolderOf("models", "compressed", "finetuned")]


@dataclass(frozen=True)
class DeltaSource(Settings):
    """One entry of ``deltas``.

    Attributes:
        base: What is subtracted, as its folder below data/: ``models/<model>``, or, for a base that
            is served compressed, ``compressed/<run>`` or ``finetuned/<finetune>``.
        finetuned: Name of the fine-tuned model.
    """

    base: Base
    finetuned: Model


@dataclass(frozen=True)
class DeltaRun(Settings):
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

    delta: Annotated[str, NameOf("deltas")]
    base: Base
    finetuned: Annotated[str, NameOf("calibrations")]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sequential: bool = False


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
    check_same(("base", "finetuned"), f"delta_runs.{key}", run, f"delta {run.delta!r}", delta)
    return run
