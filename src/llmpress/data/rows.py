"""Files as people keep text in them: tables of rows, read with the place of each, or plain text."""

import codecs
import csv
import gzip
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpress.core.errors import SourceError
from llmpress.core.failures import one_line
from llmpress.data.chats import chat_text, is_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINES = (".jsonl", ".ndjson")
TABLES = (*LINES, ".csv", ".tsv", ".parquet", ".arrow")
PACKED = ".gz"
logger = logging.getLogger(__name__)

KNOWN = "`text`, `messages`, or `prompt` and `completion`"


def kind(file: Path) -> str:
    """Return the suffix that says what is in a file, such as ``.jsonl`` of ``x.jsonl.gz``."""
    name = file.with_suffix("") if file.suffix.lower() == PACKED else file
    return name.suffix.lower()


def plain_text(file: Path) -> str:
    """Return the content of a text file: UTF-8, or UTF-16 that says so.

    Raises:
        SourceError: It is neither.
        FileNotFoundError: No such file.
    """
    try:
        content = file.read_bytes()
        if file.suffix.lower() == PACKED:
            content = gzip.decompress(content)
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise SourceError(f"{file}: damaged, or no gzip file ({one_line(error)})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a table.

    Raises:
        SourceError: The file is damaged, or of another format.
    """
    return [row for _, row in numbered_rows(file)]


def numbered_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Read the rows of a table, each with where it stands: ``line 3`` or ``row 3``.

    Raises:
        SourceError: The file is damaged, or of another format.
    """
    ending = kind(file)
    if ending not in (*TABLES, ".json") or ending in LINES:
        yield from _json_lines(file)
        return
    try:
        if ending == ".json":
            rows = json.loads(plain_text(file))
        elif ending == ".arrow":
            import datasets

            rows = datasets.Dataset.from_file(str(file)).to_list()
        elif ending == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            csv.field_size_limit(sys.maxsize)
            between = "\t" if ending == ".tsv" else ","
            rows = list(csv.DictReader(io.StringIO(plain_text(file)), delimiter=between))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, csv.Error) as error:
        raise SourceError(f"{file}: damaged, or no {ending} file ({one_line(error)})") from None
    yield from _numbered(rows)


def rows_if_table(file: Path) -> list[tuple[str, Any]] | None:
    """Return the rows of a table, None of a file that is none.

    A .json file is one where it holds a list, JSON lines, or an object that is a row.

    Raises:
        SourceError: The file is damaged, or of another format.
    """
    if kind(file) != ".json":
        return list(numbered_rows(file)) if kind(file) in TABLES else None
    try:
        content = json.loads(plain_text(file))
    except ValueError:
        try:
            return list(_json_lines(file))
        except SourceError:
            return None
    if isinstance(content, dict) and {"text", "messages", "prompt"} & content.keys():
        content = [content]
    return list(_numbered(content)) if isinstance(content, list) else None


def table_texts(
    file: Path,
    rows: Iterable[tuple[str, Any]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    field: str | None = None,
) -> list[str]:
    """Return the documents of a table's rows, and show the first one; see `row_text`.

    Rows of null are passed over, and counted in a warning.

    Raises:
        SourceError: A row holds no text; names it.
    """
    found, nulls = [], []
    for where, row in rows:
        try:
            text = row_text(row, tokenizer, field)
        except SourceError as error:
            raise SourceError(f"{file}: {where} {error}") from None
        if text is None:
            nulls.append(where)
        else:
            found.append(text)
    if nulls:
        logger.warning("%s: %d rows hold null (%s first), left out", file, len(nulls), nulls[0])
    if found:
        logger.warning("%s: %d documents, the first begins %r", file, len(found), found[0][:60])
    return found


def row_text(
    row: Any, tokenizer: "PreTrainedTokenizerBase | None" = None, field: str | None = None
) -> str | None:
    """Return the document that a row holds, None where it says so itself (null).

    Args:
        row: A text, or a mapping.
        tokenizer: Writes chats; None refuses them.
        field: The column that holds the text; by default whichever of the usual ones is there.

    Raises:
        SourceError: It holds none.
    """
    if isinstance(row, str) and field is None:
        return row
    if not isinstance(row, Mapping):
        raise SourceError(f"is no object with {KNOWN}")
    names = [field] if field is not None else ["text", "messages"]
    name = next((name for name in names if name in row), None)
    if name is not None:
        value = row[name]
        if value is None or isinstance(value, str):
            return value
        if is_chat(value):
            return _chat(tokenizer, value)
        raise SourceError(f"{name!r} holds {type(value).__name__}, not text")
    if field is None and {"prompt", "completion"} <= row.keys():
        return _answered(tokenizer, row["prompt"], row["completion"])
    have = ", ".join(map(str, row)) or "nothing"
    missing = KNOWN if field is None else f"column {field!r}"
    remedy = "" if field is None else "; correct `field:` in params.yaml"
    raise SourceError(f"has no {missing} (it has {have}){remedy}")


def _chat(tokenizer: "PreTrainedTokenizerBase | None", messages: list[Mapping[str, Any]]) -> str:
    if tokenizer is None:
        raise SourceError(
            "holds chat messages, which become text by a model's own template: give the file as "
            "--text, or write it as text first"
        )
    return chat_text(tokenizer, messages)


def _answered(
    tokenizer: "PreTrainedTokenizerBase | None", prompt: object, completion: object
) -> str | None:
    if prompt is None or completion is None:
        return None
    if is_chat(prompt) and is_chat(completion):
        return _chat(tokenizer, [*prompt, *completion])  # type: ignore[misc]
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise SourceError("`prompt` and `completion` are neither texts nor lists of messages")
    if tokenizer is None or tokenizer.chat_template is None:
        return prompt + completion
    turns = (("user", prompt), ("assistant", completion))
    return _chat(tokenizer, [{"role": role, "content": content} for role, content in turns])


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    # not splitlines(): it also splits at the line separators of other scripts
    for number, line in enumerate(plain_text(file).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise SourceError(
                    f"{file}: line {number} is damaged, no JSON ({one_line(error)})"
                ) from None
