"""What a finetuning sees: examples in the order of the steps, and others that it is judged by."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmpress.core.errors import SourceError
from llmpress.data.corpora import CalibrationText, token_windows
from llmpress.training.examples import Example, encode, window_examples
from llmpress.training.settings import FinetuningSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Examples to train on and to judge by.

    Attributes:
        train: In the order of the steps, ``steps * batch_size`` of them.
        held_out: Never trained on.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]


def task_data(
    records: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: FinetuningSettings,
    seed: int,
) -> TrainingData:
    """Shuffle worked answers and hold the last ones out.

    As long as the steps do not go through all items, these are the items and the order in which
    ``finetuned_models`` sees them.

    Raises:
        SourceError: Too few items, or items without ``query`` and ``target``.
    """
    if len(records) <= settings.held_out:
        raise SourceError(
            f"{len(records)} training items, and `held_out` asks for {settings.held_out} of them: "
            "lower it, or give more items"
        )
    examples = random.Random(seed).sample(encode(records, tokenizer), len(records))
    pool, held_out = examples[: -settings.held_out], examples[-settings.held_out :]
    return TrainingData(_order(pool, settings, seed), held_out)


def text_data(
    texts: Mapping[str, "CalibrationText"],
    tokenizer: "PreTrainedTokenizerBase",
    settings: FinetuningSettings,
    seed: int,
) -> TrainingData:
    """Cut windows out of each text, and held-out ones out of its other documents.

    Raises:
        SourceError: A text is too short.
    """
    share = -(-settings.held_out // len(texts))
    pool: list[Example] = []
    held_out: list[list[Example]] = []
    for name, text in texts.items():
        parts = {"": (text.statistics, settings.windows), ", held-out": (text.validation, share)}
        windows = []
        for part, (documents, count) in parts.items():
            try:
                windows.append(token_windows(documents, tokenizer, settings.length, count))
            except SourceError as error:
                raise SourceError(f"text {name}{part}: {error}") from None
        pool += window_examples(windows[0])
        held_out.append(window_examples(windows[1]))
    mixed = [example for group in zip(*held_out, strict=True) for example in group]
    random.Random(seed).shuffle(pool)
    return TrainingData(_order(pool, settings, seed), mixed[: settings.held_out])


def draw(
    examples: Sequence[Example], count: int, seed: int, *, first: Sequence[Example] = ()
) -> list[Example]:
    """Go through all examples in a new random order each time, until there are ``count``.

    Args:
        examples: At least one.
        count: How many to return.
        seed: Of the orders.
        first: What comes before.
    """
    random_state = random.Random(seed)
    drawn = list(first)
    while len(drawn) < count:
        drawn += random_state.sample(examples, len(examples))
    return drawn[:count]


def _order(pool: Sequence[Example], settings: FinetuningSettings, seed: int) -> list[Example]:
    """Return the pool in its order, then again in new ones, as many as the steps take."""
    return draw(pool, settings.steps * settings.batch_size, seed + 1, first=pool)
