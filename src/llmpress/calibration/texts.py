"""Text as it is named: documents themselves, files, or corpora and tasks that the pipeline made."""

from collections.abc import Mapping
from pathlib import Path

from llmpress.core.errors import SourceError
from llmpress.data.corpora import CalibrationText, Text, documents_of, load_text, named_texts
from llmpress.data.tasks.files import TRAIN_FILE, read_items

HELD_OUT = 0.2
"""Share of a text without parts of its own, at its end, that is kept aside."""


def read_texts(text: Text) -> dict[str, CalibrationText]:
    """Return every text by name, in two parts that share nothing, never a corpus's test text.

    Args:
        text: Strings are documents, together one text called ``text``. Paths are texts of their
            own, called after the file or folder: plain UTF-8, ``.jsonl`` with a column ``text``, a
            corpus, or the training items of a task. A mapping gives the parts themselves.

    Raises:
        ConfigError: None at all, two of one name, or a string that is the name of a file.
        ArtifactError: No such file, no corpus and no task.
        SourceError: A file that holds no text.
    """
    if isinstance(text, Mapping):
        return dict(text)
    return {name: _parts(place) for name, place in named_texts(text).items()}


def text_artifacts(text: Text) -> dict[str, Path]:
    """Return the texts that are artifacts, by the role they have in a provenance."""
    if isinstance(text, Mapping):
        return {}
    folders = [p for p in named_texts(text).values() if isinstance(p, Path) and p.is_dir()]
    return {f"{'task' if is_task(path) else 'corpus'} {path.name}": path for path in folders}


def is_task(folder: Path) -> bool:
    """Whether a task's training items lie there."""
    return (folder / TRAIN_FILE).is_file()


def _parts(place: Path | list[str]) -> CalibrationText:
    if isinstance(place, Path) and place.is_dir():
        if is_task(place):
            return _task_parts(place)
        return CalibrationText(load_text(place, "calibration"), load_text(place, "validation"))
    documents = documents_of(place)
    if len(documents) == 1:  # by whole lines
        cut = documents[0].rfind("\n", 0, int(len(documents[0]) * (1 - HELD_OUT))) + 1
        return CalibrationText([documents[0][:cut]], [documents[0][cut:]])
    return _split(documents)


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
