"""Documents, the three splits that never overlap, and token windows."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.core.params import build
from llmpress.data.corpora import SPLITS, load_text, split_documents, token_windows, write_text
from llmpress.data.documents import (
    CorpusSource,
    distinct,
    read_documents,
    stdlib_documents,
)
from llmpress.data.rows import read_rows

ROWS = [{"passage": "one", "id": 1}, {"passage": "two", "id": 2}, {"passage": "one", "id": 3}]


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def documents() -> list[str]:
    return [f"Document {number}.\n\nIt says {number * number}." for number in range(40)]


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    match file.suffix:
        case ".arrow":
            folder = file.parent / "saved"
            datasets.Dataset.from_list(rows).save_to_disk(folder)
            next(folder.glob("*.arrow")).rename(file)
        case ".parquet":
            pd.DataFrame(rows).to_parquet(file)
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("kind", [".arrow", ".parquet", ".jsonl"])
def test_tables_give_their_distinct_documents(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"part{kind}"
    write_table(file, ROWS)
    assert read_rows(file) == ROWS
    assert read_documents([file], "passage", None) == ["one", "two"]
    with pytest.raises(SourceError, match=r"'text' .*passage, id"):
        read_documents([file], "text", None)


@pytest.mark.parametrize("kind", [".arrow", ".parquet", ".jsonl"])
def test_damaged_tables_are_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"part{kind}"
    file.write_bytes(b"{broken")
    with pytest.raises(SourceError, match=f"part{kind}"):
        read_documents([file], "passage", None)


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  first\n\nstill first \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    files = sorted(tmp_path.iterdir())
    assert read_documents(files, "text", None) == ["first\n\nstill first", "second"]


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"a\.txt"):
        read_documents([tmp_path / "a.txt"], "text", None)


def test_distinct_drops_empty_repeated_and_what_is_too_much() -> None:
    assert distinct([" a ", "", "b", "a", "\x1e", "c\x1ed", "e"], None) == ["a", "b", "c d", "e"]
    assert distinct(["aaaa", "aaaa", "bbbb", "c"], 8) == ["aaaa", "bbbb"]


def test_standard_library_is_bounded_python_in_a_fixed_order() -> None:
    documents, origin = stdlib_documents(200_000)
    assert 50_000 < sum(map(len, documents)) <= 200_000
    assert documents == stdlib_documents(200_000)[0]
    assert set(documents[:3]) <= set(stdlib_documents(400_000)[0])
    assert origin["implementation"] == "CPython"
    for document in documents:
        compile(document, "document", "exec", dont_inherit=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"python_stdlib": True, "path": "x"}, "python_stdlib"),
        ({}, "package, hub and path"),
        ({"path": "x", "fields": "y"}, "'fields'.* 'field'"),
    ],
    ids=["two", "none", "unknown"],
)
def test_corpus_source_is_validated(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(CorpusSource, {"license": "MIT", **values}, "corpora.c")


def test_splits_are_a_partition_that_depends_on_the_seed(documents: list[str]) -> None:
    splits = split_documents(documents, seed=0)
    assert [len(splits[name]) for name in SPLITS] == [32, 4, 4]
    assert sorted(document for part in splits.values() for document in part) == sorted(documents)
    assert splits == split_documents(documents, seed=0)
    assert splits != split_documents(documents, seed=1)


def test_too_few_documents_are_refused(documents: list[str]) -> None:
    with pytest.raises(SourceError, match="9 documents"):
        split_documents(documents[:9], seed=0)


def test_text_survives_the_disk(tmp_path: Path) -> None:
    documents = ["a\n\nb", "Grüße \u2028 and \r\n line ends", "x"]
    sizes = write_text(tmp_path, {"test": documents})
    assert load_text(tmp_path, "test") == documents
    assert sizes == {"test": {"documents": 3, "characters": sum(map(len, documents))}}
    with pytest.raises(ArtifactError, match=r"validation\.txt"):
        load_text(tmp_path, "validation")
    with pytest.raises(ValueError, match="split 'train'"):
        load_text(tmp_path, "train")


def test_windows_are_the_text_in_order(
    tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> None:
    windows = token_windows(documents, tokenizer, length=16, count=5)
    assert windows.shape == (5, 16)
    assert windows.dtype == torch.int64
    assert "\n\n".join(documents).startswith(tokenizer.decode(windows.flatten()))


@pytest.mark.parametrize("count", [1, 3, 20])
def test_fewer_windows_are_the_first_ones(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int
) -> None:
    many = token_windows(documents, tokenizer, length=16, count=24)
    few = token_windows(documents, tokenizer, length=16, count=count)
    torch.testing.assert_close(few, many[:count], rtol=0, atol=0)


class WordTokenizer:
    """One token per word: the word's length."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_text_of_long_tokens_is_taken_until_it_suffices() -> None:
    documents = ["x" * 49] * 400
    windows = token_windows(documents, WordTokenizer(), length=10, count=10)  # type: ignore[arg-type]
    assert windows.tolist() == [[49] * 10] * 10


def test_seed_shuffles_documents_reproducibly(
    tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> None:
    first, again, other = (
        token_windows(documents, tokenizer, 16, 4, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_every_window_starts_with_the_bos_that_a_tokenizer_demands(
    tiny_model_folder: Path, documents: list[str]
) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    windows = token_windows(documents, tokenizer, length=9, count=4)
    assert windows.shape == (4, 9)
    assert windows[:, 0].tolist() == [0, 0, 0, 0]
    expected = token_windows(documents, plain, length=8, count=4)
    torch.testing.assert_close(windows[:, 1:], expected, rtol=0, atol=0)


@pytest.mark.parametrize("documents", [[], ["too short"]], ids=["empty", "short"])
def test_too_little_text_is_refused(
    tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> None:
    with pytest.raises(SourceError, match="4 windows of 32 tokens"):
        token_windows(documents, tokenizer, length=32, count=4)


@pytest.mark.parametrize(("length", "count"), [(0, 1), (8, 0)])
def test_empty_windows_are_refused(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, count: int
) -> None:
    with pytest.raises(ValueError, match=f"{length}.*{count}|{count}.*{length}"):
        token_windows(documents, tokenizer, length, count)
