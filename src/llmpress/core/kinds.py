"""The kinds of what is evaluated: where each stands in params.yaml, on disk and in the report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

KindName = Literal["model", "compressed", "delta", "finetuned", "trained", "peer"]


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: In results.
        section: Section of params.yaml that names them; models to evaluate are a list.
        folder: Where their artifacts lie, below data/.
        evaluated_by: Stage that measures one.
        label: In the report.
        original: Key of an entry that names the model it is compared with; a model's is itself.
        start: Key of an entry that names what it was finetuned from.
    """

    name: KindName
    section: str
    folder: str
    evaluated_by: str
    label: str
    original: str | None = None
    start: str | None = None

    def entries(self, params: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return what params.yaml says of each, by name."""
        if self.original is None:
            return {name: {} for name in (params.get("evaluation") or {}).get("models") or ()}
        return params.get(self.section) or {}


KINDS = (
    Kind(
        name="model",
        section="evaluation.models",
        folder="models",
        evaluated_by="evaluate_model",
        label="model",
    ),
    Kind(
        name="compressed",
        section="runs",
        folder="compressed",
        evaluated_by="evaluate",
        label="weights",
        original="model",
    ),
    Kind(
        name="delta",
        section="delta_runs",
        folder="compressed",
        evaluated_by="evaluate_delta",
        label="delta",
        original="finetuned",
    ),
    Kind(
        name="finetuned",
        section="finetunes",
        folder="finetuned",
        evaluated_by="evaluate_finetuned",
        label="weights, finetuned",
        original="model",
        start="run",
    ),
    Kind(
        name="trained",
        section="trainings",
        folder="trained",
        evaluated_by="evaluate_trained",
        label="trained on a task",
        original="model",
        start="start",
    ),
    Kind(
        name="peer",
        section="peers",
        folder="peers",
        evaluated_by="evaluate_peer",
        label="weights, by another tool",
        original="model",
    ),
)
"""In the order of dvc.yaml."""
SECTIONS_OF_FOLDER = {
    "models": ("models", "finetuned_models"),
    "compressed": ("runs", "delta_runs"),
    "finetuned": ("finetunes",),
    "trained": ("trainings",),
    "peers": ("peers",),
}
"""Which sections of params.yaml name the artifacts of a folder below data/."""
