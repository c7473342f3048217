"""What lies beside a model's weights comes along: the same tokens from source and artifact."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tiny_models import library_text
from transformers import AutoTokenizer

import llmpress
from llmpress.models.checkpoints.files import copy_companions

AWKWARD = (
    "",
    " ",
    "\n\n\tdef f(x):\r\n",
    "a <|call|> b<|call|>",
    "naïve café “quotes” …",
    "日本語 한국어 العربية",
    "👩‍👩‍👧 \u200b\ufeff zero\u0000byte",
    "1234567890 __init__ -> !=",
)


def as_it_is(folder: Path) -> None:
    del folder


def slow(folder: Path) -> None:
    """Vocabulary and merges, and tokens that only added_tokens.json has."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<|call|>": 511}), encoding="utf-8")


def sentencepiece_of(name: str, tokenizer_class: str) -> Callable[[Path], None]:
    def kind(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with (folder / name).open("wb") as file:
            SentencePieceTrainer.train(  # 300 pieces and the bytes
                sentence_iterator=iter("\n".join(library_text(("xml", "json"))).splitlines()),
                model_writer=file, vocab_size=600, model_type="bpe", byte_fallback=True,
                pad_id=3, minloglevel=2,
            )  # fmt: skip
        named = {"tokenizer_class": tokenizer_class, "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
        added = {"<|call|>": 600}
        (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")

    return kind


def tiktoken(folder: Path) -> None:
    """The bytes and some pairs of them, in ranks."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ranks = [bytes([n]) for n in range(256)] + [b"in", b"re", b" s", b"def", b"import"]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|call|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def templates(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {
        "default": "D{{ messages[0]['content'] }}",
        "tool_use": "T{{ messages[0]['content'] }}",
    }
    tokenizer.save_pretrained(folder)


KINDS = {
    "as-it-is": as_it_is,
    "slow": slow,
    "templates": templates,
    "llama": sentencepiece_of("tokenizer.model", "LlamaTokenizer"),
    "t5": sentencepiece_of("spiece.model", "T5Tokenizer"),
    "tiktoken": tiktoken,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_copy_gives_the_same_tokens(
    kind: Callable[[Path], None], tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model_folder, tmp_path / "source"))
    kind(source)
    (tmp_path / "copy").mkdir()
    copy_companions(source, tmp_path / "copy")
    shutil.copy(source / "config.json", tmp_path / "copy")
    ours, theirs = (llmpress.load_tokenizer(folder) for folder in (tmp_path / "copy", source))
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    assert ours.chat_template == theirs.chat_template
    for text in AWKWARD:
        assert ours(text).input_ids == theirs(text).input_ids
    assert len(set(theirs(AWKWARD[2]).input_ids)) > 4  # and they are tokens


FILES_WITH_CODE = ("config.json", "tokenizer_config.json")


def test_no_code_is_named_that_does_not_come_along(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model_folder, tmp_path / "source"))
    for name in FILES_WITH_CODE:
        config = json.loads((source / name).read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
        (source / name).write_text(json.dumps(config), encoding="utf-8")
    llmpress.compress_model(source, method="rtn", bits=8, out=tmp_path / "small")
    llmpress.export_dense(tmp_path / "small", out=tmp_path / "dense")
    for made in ("small", "dense"):
        for name in FILES_WITH_CODE:
            config = json.loads((tmp_path / made / name).read_text(encoding="utf-8"))
            assert config
            assert "auto_map" not in config


NAMES = (
    *("added_tokens.json", "chat_template.json", "tekken.json", "processor_config.json"),
    *(
        "sentencepiece.bpe.model",
        "spiece.model",
        "tokenizer.model.v3",
        "qwen.tiktoken",
        "tiktoken.model",
        "bpe.codes",
    ),
    *("preprocessor_config.json", "dict.txt", "LICENSE", "NOTICE.txt", "chat_template.jinja"),
    "additional_chat_templates/tool_use.jinja",
)


def test_files_of_every_kind_come_along_and_no_others(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer").mkdir()  # a folder of that name is no tokenizer
    (source / "tokenizer/x.json").touch()
    code = ("modeling_mine.py", "tokenizer_mine.py", "vocab.py")
    for name in (*NAMES, "model.safetensors", "config.json", "README.md", *code):
        (source / name).touch()
    copy.mkdir()
    copy_companions(source, copy)
    found = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    assert found == set(NAMES)
