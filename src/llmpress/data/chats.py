"""Chats as the text that a model reads: written by its tokenizer's template, or refused."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpress.core.errors import SourceError
from llmpress.core.failures import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool = False,
) -> str:
    """Write a chat as the tokenizer's template does.

    Args:
        tokenizer: The model's.
        messages: Mappings with ``role`` and ``content``.
        answer: Whether the text ends where an answer begins.

    Raises:
        SourceError: No template, or one that fails or writes nothing of these messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise SourceError("this tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise SourceError(
            f"the tokenizer's chat template refuses these messages ({one_line(error)})"
        ) from None
    if not str(text).strip():
        raise SourceError("the tokenizer's chat template writes nothing of these messages")
    return str(text)


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in value)
    )
