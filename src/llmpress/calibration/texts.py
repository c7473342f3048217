"""Text as it is named: documents themselves, files, or corpora and tasks that the pipeline made."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmpress.core.errors import SourceError
from llmpress.data.corpora import CalibrationText, Text, documents_of, load_text, named_texts
from llmpress.data.tasks.files import TRAIN_FILE, read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.2
"""Share of a text without parts of its own, at its end, that is kept aside."""


def read_texts(
    text: Text, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> dict[str, CalibrationText]:
    """Return every text by name, in two parts that share nothing, never a corpus's test text.

    Args:
        text: Strings are documents, together one text called ``text``. Paths are texts of their
            own, called after the file or folder: a file as `documents_of` reads it, a corpus, or
            the training items of a task. A mapping gives the parts themselves.
        tokenizer: The model's, for chats.

    Raises:
        ConfigError: None at all, one twice, or a string that is the name of a file.
        ArtifactError: No such file, no corpus and no task.
        SourceError: A file that holds no text, or a row that holds none.
    """
    if isinstance(text, Mapping):
        return dict(text)
    return {name: _parts(place, tokenizer) for name, place in named_texts(text).items()}


def text_artifacts(text: Text) -> dict[str, Path]:
    """Return the texts that are artifacts, by the role they have in a provenance."""
    if isinstance(text, Mapping):
        return {}
    return {
        f"{'task' if is_task(place) else 'corpus'} {name}": place
        for name, place in named_texts(text).items()
        if isinstance(place, Path) and place.is_dir()
    }


def is_task(folder: Path) -> bool:
    """Whether a task's training items lie there."""
    return (folder / TRAIN_FILE).is_file()


def _parts(place: Path | list[str], tokenizer: "PreTrainedTokenizerBase | None") -> CalibrationText:
    if isinstance(place, Path) and place.is_dir():
        if is_task(place):
            return _task_parts(place)
        return CalibrationText(load_text(place, "calibration"), load_text(place, "validation"))
    documents = documents_of(place, tokenizer)
    if len(documents) == 1:
        cut = _cut(documents[0])
        return CalibrationText([documents[0][:cut]], [documents[0][cut:]])
    return _split(documents)


def _cut(document: str) -> int:
    """Return where a document is cut: after a line, a word, or a character, the first that fits."""
    at = int(len(document) * (1 - HELD_OUT))
    cuts = (document.rfind(after, 0, at) + 1 for after in ("\n", " "))
    return next((cut for cut in cuts if 2 * cut > at), at)


def _task_parts(folder: Path) -> CalibrationText:
    """Read the training items of a task as text: what a fine-tuned model was made for."""
    items = read_items(folder / TRAIN_FILE)
    try:
        return _split([item["query"] + item["target"] for item in items])
    except (KeyError, TypeError):
        raise SourceError(
            f"{folder}: its items hold no `query` and `target`: use a generated task"
        ) from None


def _split(documents: list[str]) -> CalibrationText:
    cut = int(len(documents) * (1 - HELD_OUT))
    return CalibrationText(documents[:cut], documents[cut:])
