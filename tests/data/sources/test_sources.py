"""Wheels and folders, opened without installing, importing or unpickling; hubs in test_hub.py."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llmpress.core.errors import ConfigError, SourceError
from llmpress.core.params import build
from llmpress.data.sources.patterns import matches
from llmpress.data.sources.pretrained import ModelSource, write_model
from llmpress.data.sources.source import Opened, Source, opened


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel that is the only thing pip can find."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "toy_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "toy_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_data/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("toy_data/sets/a/part.txt", "alpha")
        wheel.writestr("toy_data/sets/b/deep/part.txt", "beta")
        wheel.writestr("toy_data/sets/c.bin", "other")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "package, hub and path"),
        ({"package": "a==1", "path": "x"}, "package, path"),
        ({"package": "a"}, "package.* name==version"),
        ({"package": "a>=1"}, "a>=1"),
        ({"package": "--index-url==1"}, "--index-url==1"),
        ({"hub": "owner/name"}, "owner/name@revision"),
    ],
    ids=["none", "two", "no-version", "range", "an-option", "no-revision"],
)
def test_source_must_be_one_and_pinned(values: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Source(license="MIT", **values)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a/b/c.arrow", "a/**/*.arrow", True),
        ("a/c.arrow", "a/**/*.arrow", True),
        ("a/b/c.arrow", "a/*.arrow", False),
        ("c.txt", "**/*.txt", True),
        ("xa/c.arrow", "a/**/*.arrow", False),
        ("a/c.arrowx", "a/*.arrow", False),
        ("a/cXarrow", "a/c.arrow", False),
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, [pattern]) is expected


def test_package_is_read_as_a_zip(package_index: Path) -> None:
    source = Source(license="MIT", package="toy-data==1.0")
    with opened(source, ["toy_data/sets/**/part.txt"]) as source:
        assert [file.read_text() for file in source.files] == ["alpha", "beta"]
        everything = [file for file in source.folder.rglob("*") if file.is_file()]
        assert len(everything) == 2, "files that do not match are not unpacked"
        folder = source.folder
    wheel = next(package_index.iterdir())
    assert source.origin == {
        "package": "toy-data==1.0",
        "wheel": wheel.name,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
    }
    assert not folder.exists()


@pytest.mark.usefixtures("package_index")
@pytest.mark.parametrize(
    ("package", "pattern", "named"),
    [
        ("toy-data==2.0", "*", "toy-data==2.0"),
        ("toy-data==1.0", "*.gguf", "toy-data==1.0 .*gguf"),
    ],
    ids=["no-such-version", "no-such-file"],
)
def test_package_errors_name_it(package: str, pattern: str, named: str) -> None:
    with (
        pytest.raises(SourceError, match=named) as caught,
        opened(Source(license="MIT", package=package), [pattern]),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_path_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    with opened(Source(license="MIT", path=str(tmp_path)), ["*.txt"]) as source:
        assert [file.name for file in source.files] == ["a.txt", "b.txt"]
    assert (tmp_path / "a.txt").exists()


def test_missing_path_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"gone .*`path:`"),
        opened(Source(license="MIT", path=str(tmp_path / "gone")), ["*"]),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"package": "a==1"}, "`file:`"),
        ({"package": "a==1", "file": "model.bin"}, r"model\.bin"),
        ({"package": "a==1", "file": "m.gguf", "sha256": "b179"}, "sha256.* `file:`"),
        ({"path": "x", "sha": "y"}, "'sha'.* ('path'|'sha256')"),
        ({"path": "x", "hub": "a/b@c"}, "hub, path"),
    ],
    ids=["no-file", "pickle", "short-digest", "unknown-key", "two-sources"],
)
def test_model_source_is_validated(values: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(ModelSource, {"license": "MIT", **values}, "models.m")


def copied(source: Path, out: Path) -> None:
    spec = ModelSource(license="MIT", path=str(source))
    out.mkdir(exist_ok=True)
    with opened(spec, spec.patterns()) as fetched:
        write_model(spec, fetched, out)


def test_local_model_is_copied_byte_for_byte(tiny_model_folder: Path, tmp_path: Path) -> None:
    copied(tiny_model_folder, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tiny_model_folder / name).read_bytes()


def test_everything_beside_the_weights_comes_along_and_no_code(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model_folder, tmp_path / "source"))
    (source / "model.safetensors").rename(source / "pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    beside = ("qwen.tiktoken", "tekken.json", "tokenizer.model.v3", "LICENSE", "NOTICE.txt")
    beside += ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.bpe")
    (source / "additional_chat_templates").mkdir()
    for name in (*beside, "tokenizer_own.py", "consolidated.safetensors", "training_args.bin"):
        (source / name).touch()
    copied(source, tmp_path / "out")
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    found |= {name for name in ("LICENSE",) if (tmp_path / "out" / name).is_file()}
    left = {"tokenizer_own.py", "consolidated.safetensors", "training_args.bin"}
    assert found == expected - left


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": "{}", "pytorch_model.bin": ""}, "safetensors"),
        ({"model.safetensors": ""}, r"config\.json"),
        (
            {
                "config.json": '{"model_type": "odd", "auto_map": {"AutoConfig": "own.Config"}}',
                "own.py": "raise SystemExit('run')",
                "model.safetensors": "",
            },
            "code",
        ),
        (
            {
                "config.json": '{"model_type": "llama"}',
                "model-00001-of-00002.safetensors": "",
                "model.safetensors.index.json": '{"weight_map": {"a": '
                '"model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
            },
            r"model-00002-of-00002\.safetensors",
        ),
    ],
    ids=["pickle-only", "no-config", "remote-code", "missing-shard"],
)
def test_unusable_model_folders_are_refused(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(SourceError, match=named) as caught:
        copied(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_changed_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"other")
    source = ModelSource(license="MIT", path=str(tmp_path), file="m.gguf", sha256="0" * 64)
    with pytest.raises(SourceError, match=r"m\.gguf: .*d9298a10.* 000"):
        write_model(source, Opened(tmp_path, [file]), tmp_path)


def write_gguf(model_folder: Path, file: Path) -> None:
    """Write the tiny Llama as an fp32 GGUF, rows of q and k in the order that format wants."""
    config = json.loads((model_folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model_folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            groups = heads if stem.endswith("q_proj") else kv_heads
            values = values.reshape(groups, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_fp32_safetensors(tiny_model_folder: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model_folder, tmp_path / "tiny.gguf")
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    source = ModelSource(license="MIT", path=str(tmp_path), file="tiny.gguf", sha256=digest)
    out = tmp_path / "out"
    out.mkdir()
    with opened(source, source.patterns()) as fetched:
        write_model(source, fetched, out)
    original = load_file(tiny_model_folder / "model.safetensors")
    converted = load_file(out / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(converted[name], tensor, rtol=0, atol=0)
    text = "def f(x):\n    return x + 1"
    ids = [
        AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (out, tiny_model_folder)
    ]
    assert ids[0] == ids[1]
