"""Files of text as people keep them: read as they are meant, or refused with the row's place."""

import codecs
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmpress.calibration.texts import read_texts, text_artifacts
from llmpress.core.errors import ConfigError, SourceError
from llmpress.data.chats import chat_text
from llmpress.data.corpora import documents_of, measured_texts
from llmpress.data.documents import read_documents
from llmpress.data.tasks.files import write_items

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
WRITTEN = "<user>one?<assistant>two"
Write = Callable[[Path, Sequence[Any]], None]


def lines(file: Path, rows: Sequence[Any]) -> None:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    pack = gzip.compress if file.suffix == ".gz" else bytes
    file.write_bytes(pack(text.encode()))


def lines_with_mark_and_gaps(file: Path, rows: Sequence[Any]) -> None:
    text = "\r\n\r\n".join(json.dumps(row) for row in rows)
    file.write_bytes(codecs.BOM_UTF8 + text.encode())


def array(file: Path, rows: Sequence[Any]) -> None:
    file.write_text(json.dumps(list(rows), indent=2))


def table(file: Path, rows: Sequence[Any]) -> None:
    frame = pd.DataFrame(rows)
    if file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")


FORMATS = [
    ("x.jsonl", lines),
    ("x.JSONL", lines),
    ("x.ndjson", lines),
    ("x.jsonl.gz", lines),
    ("x.jsonl", lines_with_mark_and_gaps),
    ("x.json", array),
    ("x.json", lines),
    ("x.parquet", table),
    ("x.csv", table),
    ("x.tsv", table),
]
NESTED = [one for one in FORMATS if one[0] not in ("x.csv", "x.tsv")]


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    """With a chat template."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model_folder)
    loaded.chat_template = TEMPLATE
    return loaded


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_rows_with_text(name: str, write: Write, tmp_path: Path) -> None:
    texts = ['a "quoted" one,\nof two lines', "ü\u2028b", "c"]
    write(tmp_path / name, [{"id": i, "text": text} for i, text in enumerate(texts)])
    assert documents_of(tmp_path / name) == texts
    assert read_documents([tmp_path / name], "text", None) == texts


@pytest.mark.parametrize(("name", "write"), NESTED)
def test_chats_are_written_by_the_template(
    name: str, write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / name
    write(file, [{"messages": CHAT}] * 2)
    assert documents_of(file, tokenizer) == [WRITTEN] * 2
    assert read_texts(file, tokenizer)[name].statistics == [WRITTEN]
    assert measured_texts(file, tokenizer) == {name: [WRITTEN] * 2}
    tokenizer.chat_template = None
    for action in (
        lambda: documents_of(file, tokenizer),
        lambda: documents_of(file),
        lambda: read_documents([file], "messages", None),
    ):
        with pytest.raises(SourceError, match=rf"{name}: (row|line) 1 "):
            action()


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_prompts_and_completions(
    name: str, write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write(tmp_path / name, [{"prompt": "one?", "completion": "two"}])
    assert documents_of(tmp_path / name, tokenizer) == [WRITTEN]
    tokenizer.chat_template = None
    assert documents_of(tmp_path / name, tokenizer) == ["one?two"]
    if (name, write) in NESTED:
        tokenizer.chat_template = TEMPLATE
        write(tmp_path / name, [{"prompt": CHAT[:1], "completion": CHAT[1:]}])
        assert documents_of(tmp_path / name, tokenizer) == [WRITTEN]


def test_rows_may_be_texts_themselves(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", ["a", "b"])
    array(tmp_path / "x.json", ["a", "b"])
    assert documents_of(tmp_path / "x.jsonl") == documents_of(tmp_path / "x.json") == ["a", "b"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_null_is_no_document(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write = lines if name == "x.jsonl" else table
    write(tmp_path / name, [{"text": "a"}, {"text": None}, {"text": "b"}])
    assert documents_of(tmp_path / name) == ["a", "b"]
    assert read_documents([tmp_path / name], "text", None) == ["a", "b"]
    assert "1 rows hold null" in caplog.text
    assert "2 first" in caplog.text
    assert "2 documents, the first begins 'a'" in caplog.text
    write(tmp_path / name, [{"text": None}])
    with pytest.raises(SourceError, match=name):
        documents_of(tmp_path / name)


@pytest.mark.parametrize(
    "row",
    [
        {"txt": "a"},
        {"text": 3},
        {"text": ["a"]},
        {"text": {"a": 1}},
        {"messages": []},
        {"messages": "a", "text": 1},
        {"messages": [{"content": "a"}]},
        {"messages": [1]},
        {"prompt": "a"},
        {"prompt": "a", "completion": 1},
        {"prompt": CHAT, "completion": "a"},
        {},
        [1],
        3,
        True,
        None,
    ],
    ids=repr,
)
def test_what_is_no_text_is_refused_with_its_place(
    row: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines(tmp_path / "x.jsonl", [{"text": "a"}, row])
    array(tmp_path / "x.json", [{"text": "a"}, row])
    for name, place in (("x.jsonl", "line 2"), ("x.json", "row 2")):
        with pytest.raises(SourceError, match=rf"{name}: {place} "):
            documents_of(tmp_path / name, tokenizer)
        with pytest.raises(SourceError, match=rf"{name}: {place} "):
            read_documents([tmp_path / name], "text", None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"'),
        ("x.csv", b"text\n\xff"),
        ("x.parquet", b"PAR1"),
        ("x.jsonl.gz", b"no gzip"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-4]),
        ("x.json", b'{"compilerOptions": {}}'),
        ("x.json", b"{"),
        ("x.txt", b"\xff\xfe\x00"),
        ("x.txt", b"caf\xe9"),
        ("x.txt", b" \n"),
        ("x.jsonl", b""),
    ],
    ids=range(11),  # the bytes that gzip writes change with the time
)
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=name):
        documents_of(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "a\nü".encode(),
        codecs.BOM_UTF8 + "a\nü".encode(),
        "a\r\nü".encode("utf-16"),
        "a\rü".encode(),
    ],
    ids=["utf-8", "with a mark", "utf-16", "old line ends"],
)
def test_plain_text_is_one_document(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert documents_of(tmp_path / "x.txt") == ["a\nü"]
    assert read_documents([tmp_path / "x.txt"], "text", None) == ["a\nü"]


def test_json_that_is_no_table_is_a_document_of_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"private": true}')
    assert read_documents([tmp_path / "x.json"], "text", None) == ['{"private": true}']


@pytest.mark.parametrize(
    ("document", "cut"),
    [
        ("line\n" * 10, 40),
        ("word " * 10, 40),
        ("字" * 50, 40),
        ("a\n" + "word " * 10, 37),
        ("a " + "字" * 48, 40),
    ],
)
def test_one_document_is_cut_after_a_line_a_word_or_a_character(
    document: str, cut: int, tmp_path: Path
) -> None:
    file = tmp_path / "x.txt"
    file.write_text(document)
    parts = read_texts(file)["x.txt"]
    assert list(parts.statistics) == [document[:cut]]
    assert list(parts.validation) == [document[cut:]]


def test_places_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / folder / "train.txt" for folder in ("a/x", "b/x", "b/y")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_text(f"{number}\n" * 10)
    names = ["a/x/train.txt", "b/x/train.txt", "y/train.txt"]
    for texts in (read_texts(files), measured_texts(files, None)):  # type: ignore[arg-type]
        assert list(texts) == names
    with pytest.raises(ConfigError, match="train"):
        read_texts([files[0], files[0]])
    tasks = [tmp_path / "a/task", tmp_path / "b/task"]
    for task in tasks:
        task.mkdir()
        write_items(task / "train.jsonl", [{"query": "a", "target": "b"}] * 5)
    assert list(text_artifacts(tasks)) == ["task a/task", "task b/task"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role not supported') }}",
        "{% for m in messages %}{{ m['content'] }",
        "{{ messages[5]['content'].strip() }}",
        "{{ 1 + messages[0]['content'] }}",
        "{% for c in messages[0]['content'] %}{{ c['text'] }}{% endfor %}",
        "",
    ],
)
def test_a_template_that_fails_or_writes_nothing_is_one_line(
    template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(SourceError, match="chat template"):
        chat_text(tokenizer, CHAT)
    lines(tmp_path / "x.jsonl", [{"messages": CHAT}])
    with pytest.raises(SourceError, match=r"x\.jsonl: line 1 "):
        documents_of(tmp_path / "x.jsonl", tokenizer)
