"""What params.yaml says of runs: a model, a method, the method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from llmpress.core.params import build
from llmpress.core.params import section as lookup
from llmpress.core.settings import NameOf, Settings


@dataclass(frozen=True)
class Run(Settings):
    """One entry of ``runs``.

    Attributes:
        model: Name of the model whose weights are compressed; it has an entry in ``calibrations``.
        method: Name of a package in ``llmpress.methods``.
        settings: The method's settings.
    """

    model: Annotated[str, NameOf("calibrations")]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_run(params: Mapping[str, Any], key: str) -> Run:
    """Return run ``key`` of params.yaml, checked."""
    return build(Run, lookup(params, f"runs.{key}"), f"runs.{key}")
