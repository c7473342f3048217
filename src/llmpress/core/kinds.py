"""The kinds of what is evaluated: where each stands in params.yaml, on disk and in the report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KindName = Literal["model", "compressed", "delta", "finetuned", "trained"]


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: In results.
        section: Section of params.yaml that names them; models to evaluate are a list.
        folder: Where their artifacts lie, below data/.
        label: In the report.
        original: Key of an entry that names the model it is compared with; a model's is itself.
        start: Key of an entry that names what it was finetuned from.
    """

    name: KindName
    section: str
    folder: str
    label: str
    original: str | None = None
    start: str | None = None

    def entries(self, params: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return what params.yaml says of each, by name."""
        if self.original is None:
            return {name: {} for name in (params.get("evaluation") or {}).get("models") or ()}
        return params.get(self.section) or {}


KINDS = (
    Kind("model", "evaluation.models", "models", "model"),
    Kind("compressed", "runs", "compressed", "weights", "model"),
    Kind("finetuned", "finetunes", "finetuned", "weights, finetuned", "model", "run"),
    Kind("delta", "delta_runs", "compressed", "delta", "finetuned"),
    Kind("trained", "trainings", "trained", "trained on a task", "model", "start"),
)
"""In the order of the report."""
SECTIONS_OF_FOLDER = {
    "models": ("models", "finetuned_models"),
    "compressed": ("runs", "delta_runs"),
    "finetuned": ("finetunes",),
    "trained": ("trainings",),
}
"""Which sections of params.yaml name the artifacts of a folder below data/."""
