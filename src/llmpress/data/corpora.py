"""Text: corpora in three parts that never overlap, files, documents; token windows of them.

A corpus folder holds one UTF-8 text file per split. Documents are separated by a line with the
record separator character (U+001E), because blank lines occur inside documents.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.data.rows import kind, plain_text, rows_if_table, table_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "validation", "test")
SEPARATOR = "\n\x1e\n"


@dataclass(frozen=True)
class CalibrationText:
    """Documents of one text.

    Attributes:
        statistics: What statistics are taken over and finetuning trains on.
        validation: What finetuning is judged by; shares no document with the other.
    """

    statistics: Sequence[str]
    validation: Sequence[str]


Text = str | Path | Sequence[str | Path] | Mapping[str, CalibrationText]
"""A document (str), a place to read (Path: file, corpus or task), several, or parts by name."""


def split_documents(documents: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Shuffle and cut into 80 % calibration, 10 % validation and 10 % test, by document.

    Raises:
        SourceError: Fewer than ten documents.
    """
    if len(documents) < 10:
        raise SourceError(f"{len(documents)} documents cannot be split 80/10/10: ten are needed")
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    tenth = len(shuffled) // 10
    parts = (shuffled[2 * tenth :], shuffled[:tenth], shuffled[tenth : 2 * tenth])
    return dict(zip(SPLITS, parts, strict=True))


def write_text(folder: Path, splits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write one text file per split.

    Args:
        folder: Where to.
        splits: Documents by split; none holds the record separator.

    Returns:
        Number of documents and characters of each split.
    """
    for name, documents in splits.items():
        (folder / f"{name}.txt").write_bytes(SEPARATOR.join(documents).encode("utf-8"))
    return {
        name: {"documents": len(documents), "characters": sum(map(len, documents))}
        for name, documents in splits.items()
    }


def load_text(folder: Path, split: str) -> list[str]:
    """Return the documents of one split of a corpus.

    Raises:
        ValueError: No such split.
        ArtifactError: The folder holds no corpus.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    file = folder / f"{split}.txt"
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file; fetch the corpus again")
    return file.read_bytes().decode("utf-8").split(SEPARATOR)


def token_windows(
    documents: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    count: int,
    seed: int | None = None,
) -> Tensor:
    """Cut text into consecutive token windows.

    Documents are joined by a blank line and tokenized without special tokens; when the tokenizer
    itself starts every text with a BOS token, so does every window here.

    Args:
        documents: Text, in the order in which it is used.
        tokenizer: The model's tokenizer.
        length: Tokens per window, the BOS included.
        count: Windows; the first ones of the text are taken.
        seed: Shuffle the documents first; None keeps their order.

    Returns:
        Token ids, int64 ``[count, length]``.

    Raises:
        ValueError: A length or count that leaves no room for text.
        SourceError: The text is too short.
    """
    start = _bos(tokenizer)
    stride = length - len(start)
    if stride < 1 or count < 1:
        raise ValueError(f"length {length} and count {count} leave no room for text")
    ordered = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    tokens = _first_tokens(ordered, tokenizer, stride * count)
    if len(tokens) < stride * count:
        raise SourceError(
            f"{count} windows of {length} tokens were asked for, the text gives "
            f"{len(tokens) // stride}: lower `windows` or `length`, or use a larger corpus"
        )
    windows = torch.tensor(tokens, dtype=torch.int64).view(count, stride)
    bos = torch.tensor(start, dtype=torch.int64).expand(count, -1)
    return torch.cat([bos, windows], dim=1)  # [count, length]


def _first_tokens(
    documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int
) -> list[int]:
    """Return the first ``count`` tokens of the joined documents without tokenizing all of them.

    Text is taken until it gives some tokens more than needed, so that the end of the taken text
    has no influence on the tokens returned.
    """
    characters = 6 * count
    while True:
        taken, total = 0, 0
        while taken < len(documents) and total < characters:
            total += len(documents[taken])
            taken += 1
        text = "\n\n".join(documents[:taken])
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= count + 16 or taken == len(documents):
            return tokens[:count]
        characters *= 2


def _bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("").input_ids else []


def measured_texts(
    text: Text, tokenizer: "PreTrainedTokenizerBase", split: str = "test"
) -> dict[str, list[str]]:
    """Return the documents to measure a model on: a split of a corpus, else all there is.

    Raises:
        ConfigError, ArtifactError, SourceError: As `llmpress.calibration.texts.read_texts`.
    """
    if isinstance(text, Mapping):
        return {name: [*parts.statistics, *parts.validation] for name, parts in text.items()}
    return {
        name: load_text(place, split) if isinstance(place, Path) and place.is_dir()
        else documents_of(place, tokenizer)
        for name, place in named_texts(text).items()
    }  # fmt: skip


def text_paths(text: Text | None) -> list[Path]:
    """Return the places that a text is read from."""
    given = text if isinstance(text, Sequence) else [text]
    return [place for place in given if isinstance(place, Path)]


def named_texts(text: str | Path | Sequence[str | Path]) -> dict[str, Path | list[str]]:
    """Return paths and documents by name: as much of a path's end as tells it from the others.

    Raises:
        ConfigError: Nothing, or one place twice.
    """
    given = [text] if isinstance(text, str | Path) else list(text)
    if not given:
        raise ConfigError("text: name some: documents, or Paths of files, corpora or tasks")
    places = text_paths(given)
    named: dict[str, Path | list[str]] = {}
    for item in given:
        if isinstance(item, Path):
            named[name_among(item, places)] = item
            continue
        if len(item) < 1000 and "\n" not in item and Path(item).exists():
            raise ConfigError(f"text: {item!r} is a place, not a text: write Path({item!r})")
        documents = named.setdefault("text", [])
        if isinstance(documents, Path):
            raise ConfigError("text: a file called 'text' and documents; rename the file")
        documents.append(item)
    return named


def name_among(place: Path, places: Sequence[Path]) -> str:
    """Return as much of a path's end as tells it from the others.

    Raises:
        ConfigError: It is among them twice.
    """

    def whole(path: Path) -> tuple[str, ...]:
        return Path(os.path.normpath(path.absolute())).parts  # links keep their own names

    others, parts = [whole(other) for other in places], whole(place)
    others.remove(parts)
    if parts in others:
        raise ConfigError(f"{place}: is named twice; name it once")
    size = 1
    while any(other[-size:] == parts[-size:] for other in others):
        size += 1
    return place.name if size == 1 else "/".join(parts[-size:])


def documents_of(
    place: Path | list[str], tokenizer: "PreTrainedTokenizerBase | None" = None
) -> list[str]:
    """Return documents as given, or those of a file.

    Args:
        place: Documents; or a file: a table of rows with ``text``, ``messages``, or ``prompt`` and
            ``completion`` (`llmpress.data.rows.TABLES`, ``.json``), else plain text, one document.
        tokenizer: The model's, which writes messages as its chat template has them.

    Raises:
        ArtifactError: No such file.
        SourceError: It holds no text, or a row that is none.
    """
    if isinstance(place, list):
        found, name = place, "text"
    else:
        found, name = _read_documents(place, tokenizer), str(place)
    if not any(document.strip() for document in found):
        raise SourceError(f"{name}: holds no text")
    return found


def _read_documents(file: Path, tokenizer: "PreTrainedTokenizerBase | None") -> list[str]:
    if not file.is_file():
        raise ArtifactError(f"{file}: no such text file or corpus folder")
    rows = rows_if_table(file)
    if rows is None and kind(file) == ".json":
        raise SourceError(
            f"{file}: is neither a list of rows nor JSON lines; to calibrate on JSON itself name "
            "the file .txt"
        )
    return [plain_text(file)] if rows is None else table_texts(file, rows, tokenizer)
