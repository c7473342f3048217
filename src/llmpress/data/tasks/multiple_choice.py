"""Published multiple-choice sets in one form: query, choices, and the index of the right choice."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmpress.core.errors import SourceError

Row = Mapping[str, Any]


def arc(row: Row) -> dict[str, Any]:
    """ARC-Easy and ARC-Challenge: four (rarely three or five) answers with labels."""
    choices = row["choices"]
    return {
        "query": f"Question: {row['question']}\nAnswer:",
        "choices": list(choices["text"]),
        "gold": list(choices["label"]).index(row["answerKey"]),
    }


def piqa(row: Row) -> dict[str, Any]:
    """PIQA: which of two ways reaches the goal."""
    return {
        "query": f"Question: {row['goal']}\nAnswer:",
        "choices": [row["sol1"], row["sol2"]],
        "gold": int(row["label"]),
    }


TEMPLATES: dict[str, Callable[[Row], dict[str, Any]]] = {"arc": arc, "piqa": piqa}


def convert(rows: Sequence[Row], template: str, seed: int) -> list[dict[str, Any]]:
    """Bring rows into the common form, in a random order, so that the first n are a fair sample.

    Args:
        rows: As published.
        template: A key of `TEMPLATES`.
        seed: Of the order.

    Raises:
        SourceError: A row lacks what the template reads, or its answer is none of the choices.
    """
    items = []
    for number, row in enumerate(rows):
        try:
            item = TEMPLATES[template](row)
        except (KeyError, ValueError, TypeError) as error:
            raise SourceError(
                f"row {number} does not fit template {template!r} ({error}): correct `template:` "
                f"or `files:` in params.yaml (columns: {', '.join(row)})"
            ) from None
        if not 0 <= item["gold"] < len(item["choices"]):
            raise SourceError(f"row {number} has no right answer: use a split with labels")
        items.append(item)
    random.Random(seed).shuffle(items)
    return items
