"""How models and runs are measured: params.yaml's sections ``evaluation`` and ``speed``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from llmpress.core.params import build
from llmpress.core.params import section as lookup
from llmpress.core.settings import Corpora, Count, Model, NameOf, Settings, Tasks, Tokens

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """The same for every model and run, so that their numbers can be compared.

    Attributes:
        corpora: Names of the corpora on whose text likelihood is measured.
        split: Which part of them: ``validation`` while settings are chosen, ``test`` for a table.
        windows: Token windows per corpus, the first ones of that part.
        length: Tokens per window.
        dtype: Precision of likelihood and divergence. bfloat16 alone moves the predictions by some
            1.5e-3 nats per token, more than a good compressed delta does.
        tasks: Items per task, None for all.
        task_dtype: Precision of tasks and samples.
        sample_tokens: Tokens of each sample text.
        own_tasks: Further tasks with their items, by the model that is asked them: a fine-tuned
            one, and with it everything that is compared with it.
    """

    corpora: Corpora
    split: Literal["validation", "test"]
    windows: Count
    length: Tokens
    dtype: DType
    tasks: Tasks
    task_dtype: DType
    sample_tokens: Count
    own_tasks: Mapping[Model, Tasks] = field(default_factory=dict)

    def tasks_of(self, model: str) -> dict[str, int | None]:
        """Return the items by task that a model, and what is compared with it, is asked."""
        return {**self.tasks, **self.own_tasks.get(model, {})}


@dataclass(frozen=True, kw_only=True)
class Evaluation(EvaluationSettings):
    """The section ``evaluation``.

    Attributes:
        models: The uncompressed models to measure as well.
    """

    models: Annotated[tuple[Model, ...], Field(min_length=1)]


@dataclass(frozen=True)
class SpeedSettings(Settings):
    """The section ``speed``: which runs are timed as they are stored, in turns with their original.

    Attributes:
        runs: Names of runs and delta runs; none measures nothing.
        prefill_tokens: Length of the prompt.
        decode_tokens: Tokens generated after it, one at a time; two where they are slow.
        rounds: How often each is timed, after once that does not count.
        dtype: Precision of all that is not packed.
    """

    runs: tuple[Annotated[str, NameOf("runs", "delta_runs")], ...] = ()
    prefill_tokens: Count = 128
    decode_tokens: Tokens = 8
    rounds: Count = 5
    dtype: DType = "bfloat16"


def read_evaluation(params: Mapping[str, Any]) -> EvaluationSettings:
    """Return what params.yaml says of every model and run, checked."""
    values = {k: v for k, v in lookup(params, "evaluation").items() if k != "models"}
    return build(EvaluationSettings, values, "evaluation")
