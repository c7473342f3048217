"""Where a corpus's documents come from: the standard library's sources, tables, text files."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpress.core.settings import Count
from llmpress.data.corpora import SEPARATOR
from llmpress.data.rows import plain_text, rows_if_table, table_texts
from llmpress.data.sources.source import Source

STDLIB_CHARACTERS = 4_000_000
STDLIB_EXCLUDED = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
    | {"pydoc_data", "ensurepip", "__pycache__"}
)


@dataclass(frozen=True)
class CorpusSource(Source):
    """One entry of ``corpora`` in params.yaml.

    Attributes:
        files: Glob of the files inside the source: arrow, parquet, JSON, CSV or plain text.
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
        files: Tables (`llmpress.data.rows.TABLES`, and ``.json`` files that hold rows) have a text
            column; any other file is one UTF-8 document.
        field: Name of the text column.
        max_characters: Stop before so many, or None.

    Raises:
        SourceError: A row without the column, or a file that is not what its name says.
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


def _texts(file: Path, field: str) -> list[str]:
    rows = rows_if_table(file)
    return [plain_text(file)] if rows is None else table_texts(file, rows, field=field)
