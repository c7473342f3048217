"""What params.yaml says of runs: a model, a method, the method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmpress.core.params import build
from llmpress.core.params import section as lookup


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


def read_run(params: Mapping[str, Any], key: str) -> Run:
    """Return run ``key`` of params.yaml, checked."""
    return build(Run, lookup(params, f"runs.{key}"), f"runs.{key}")
