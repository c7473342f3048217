"""Where a corpus's documents come from: the standard library's sources, tables, text files."""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpress.core.errors import SourceError
from llmpress.core.settings import Count
from llmpress.data.corpora import SEPARATOR
from llmpress.data.sources.source import Source

STDLIB_CHARACTERS = 4_000_000
STDLIB_EXCLUDED = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
    | {"pydoc_data", "ensurepip", "__pycache__"}
)
TABLES = (".arrow", ".parquet", ".jsonl")


@dataclass(frozen=True)
class CorpusSource(Source):
    """One entry of ``corpora`` in params.yaml.

    Attributes:
        files: Glob of the files inside the source: arrow, parquet, JSON lines or plain text.
        field: The column that holds the text; plain text files have none.
        python_stdlib: Take the running interpreter's own standard library sources instead.
        max_characters: Stop reading documents there; null reads all.
    """

    files: str = "**/*.txt"
    field: str = "text"
    python_stdlib: bool = False
    max_characters: Count | None = None

    @property
    def made_here(self) -> str | None:
        """The standard library, which is there already."""
        return "python_stdlib" if self.python_stdlib else None


def stdlib_documents(max_characters: int | None = None) -> tuple[list[str], dict[str, Any]]:
    """Read sources of this interpreter's standard library, about 4 MB.

    Files come in the order of the hashes of their paths, which is the same everywhere and mixes
    the packages, so that the cut does not favour the start of the alphabet.

    Returns:
        The documents, and whose standard library it is, for provenance.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    kept = [name for name in files if STDLIB_EXCLUDED.isdisjoint(name.split("/"))]
    kept.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    texts = (files[name].read_text(encoding="utf-8", errors="ignore") for name in kept)
    origin = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
    }
    return distinct(texts, max_characters or STDLIB_CHARACTERS), origin


def read_documents(files: Sequence[Path], field: str, max_characters: int | None) -> list[str]:
    """Read the distinct documents of files of one or several formats.

    Args:
        files: Arrow, parquet and ``.jsonl`` files have a text column; any other file is one UTF-8
            document.
        field: Name of the text column.
        max_characters: Stop before so many, or None.

    Raises:
        SourceError: A missing column, or a file that is not what its name says.
    """
    return distinct((text for file in files for text in _texts(file, field)), max_characters)


def distinct(documents: Iterable[str], max_characters: int | None) -> list[str]:
    """Drop empty and repeated documents, keep the order, stop before ``max_characters``."""
    kept: dict[str, None] = {}
    characters = 0
    for document in documents:
        text = document.replace(SEPARATOR.strip("\n"), " ").strip()
        if not text or text in kept:
            continue
        characters += len(text)
        if max_characters is not None and characters > max_characters:
            break
        kept[text] = None
    return list(kept)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of an arrow, parquet or JSON-lines file.

    Raises:
        SourceError: The file is damaged, or of another format.
    """
    kind = file.suffix.lower()
    try:
        if kind == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        if kind == ".arrow":
            import datasets

            return datasets.Dataset.from_file(str(file)).to_list()  # type: ignore[no-any-return]
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{file.name}: damaged, or no {kind} file ({reason})") from None


def _texts(file: Path, field: str) -> Iterable[str]:
    if file.suffix.lower() not in TABLES:
        try:
            return [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise SourceError(f"{file.name}: not UTF-8 text ({error.reason})") from None
    rows = read_rows(file)
    if rows and field not in rows[0]:
        raise SourceError(
            f"{file.name}: no column {field!r} (it has {', '.join(rows[0])}); correct `field:` "
            "in params.yaml"
        )
    return [str(row[field]) for row in rows]
