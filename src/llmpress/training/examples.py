"""Examples that a model is trained on: tokens, and which of them it is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmpress.core.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A question and its worked answer as tokens, or a window of text.

    Attributes:
        tokens: Query, target and a line end; or the window's.
        num_query_tokens: How many of them are the query, which is not learnt.
    """

    tokens: list[int]
    num_query_tokens: int


def encode(
    records: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Example]:
    """Tokenize records with a ``query`` and a ``target``; a line end marks the answer's end.

    Raises:
        SourceError: A record lacks one of the two, or it is no text.
    """
    examples = []
    for number, record in enumerate(records, start=1):
        if not (
            isinstance(record, Mapping)
            and all(isinstance(record.get(key), str) for key in ("query", "target"))
        ):
            raise SourceError(
                f"training item {number} needs texts `query` and `target`: use a generated task"
            )
        query = tokenizer(record["query"]).input_ids
        target = tokenizer(record["target"] + "\n", add_special_tokens=False).input_ids
        examples.append(Example(query + target, len(query)))
    return examples


def window_examples(windows: Tensor) -> list[Example]:
    """Take every token of a window but the first for one to learn.

    Args:
        windows: Token ids, int64 ``[count, length]``.
    """
    return [Example(window, 1) for window in windows.tolist()]


def num_learnt(examples: Sequence[Example]) -> int:
    """Return how many tokens are learnt; nothing predicts the first one of an example."""
    return sum(len(item.tokens) - max(1, item.num_query_tokens) for item in examples)


def collate(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Pad a batch on the right.

    Padding needs no attention mask: in a causal model no token looks to its right.

    Returns:
        Token ids, int64 ``[B, T]``, and labels of the same shape: the token itself where it is
        part of an answer, -100 elsewhere.
    """
    length = max(len(example.tokens) for example in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full((len(batch), length), -100)
    for row, example in enumerate(batch):
        ids = torch.tensor(example.tokens)
        tokens[row, : len(ids)] = ids
        labels[row, example.num_query_tokens : len(ids)] = ids[example.num_query_tokens :]
    return tokens, labels
