"""How models and runs are evaluated: params.yaml's section ``evaluation`` without ``models``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EvaluationSettings:
    """The same for every model and run, so that their numbers can be compared.

    Attributes:
        corpora: Names of the corpora on whose test text likelihood is measured.
        windows: Token windows per corpus, the first ones of the test text.
        length: Tokens per window.
        dtype: Precision of likelihood and divergence. bfloat16 alone moves the predictions by some
            1.5e-3 nats per token, more than a good compressed delta does.
        tasks: Items per task, None for all.
        task_dtype: Precision of tasks, samples and speed.
        prefill_tokens: Length of the prompt with which speed is measured.
        decode_tokens: Tokens generated, one at a time, to measure speed; two where they are slow.
        sample_tokens: Tokens of each sample text.
        own_tasks: Further tasks with their items, by the model that is asked them: a fine-tuned
            one, and with it everything that is compared with it.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    dtype: DType
    tasks: Mapping[str, int | None]
    task_dtype: DType
    prefill_tokens: int
    decode_tokens: int
    sample_tokens: int
    own_tasks: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"windows": 1, "length": 2, "prefill_tokens": 1, "decode_tokens": 2}
        for name, minimum in {**least, "sample_tokens": 1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}, at least {minimum} is needed")
        for tasks in (self.tasks, *self.own_tasks.values()):
            for task, items in tasks.items():
                if items is not None and items < 2:
                    raise ValueError(f"tasks.{task}: {items} items give no standard error")

    def tasks_of(self, model: str) -> dict[str, int | None]:
        """Return the items by task that a model, and what is compared with it, is asked."""
        return {**self.tasks, **self.own_tasks.get(model, {})}
