"""Text named on the command line: files, or corpora and tasks that the pipeline fetched."""

from collections.abc import Sequence
from pathlib import Path

from llmpress.calibration.stage import HELD_OUT, CalibrationText, corpus_text, task_text
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.tasks.files import TRAIN_FILE


def calibration_texts(paths: Sequence[Path]) -> dict[str, CalibrationText]:
    """Return the text of each path; the end of a plain file is held out, by whole lines.

    Raises:
        SourceError: No text there, or no UTF-8.
    """
    texts = {}
    for path in paths:
        if path.is_dir():
            texts[path.name] = task_text(path) if _is_task(path) else corpus_text(path)
        else:
            text = _read(path)
            cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
            texts[path.name] = CalibrationText([text[:cut]], [text[cut:]])
    return texts


def corpus_inputs(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the paths that are artifacts, by the role they have in a provenance."""
    folders = [path for path in paths if path.is_dir()]
    return {f"{'task' if _is_task(path) else 'corpus'} {path.name}": path for path in folders}


def evaluation_text(path: Path) -> list[str]:
    """Return the test documents of a corpus, or the whole of a plain file."""
    if path.is_dir():
        from llmpress.data.corpora import load_text

        return load_text(path, "test")
    return [_read(path)]


def _is_task(folder: Path) -> bool:
    return (folder / TRAIN_FILE).is_file()


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such text file or corpus folder") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is no UTF-8 text ({error.reason})") from None
    if not text.strip():
        raise SourceError(f"{path}: holds no text")
    return text
