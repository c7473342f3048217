"""A damaged file never becomes a model, whichever door it comes in by."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_artifacts import Make
from transformers import AutoModelForCausalLM

import llmpress
from llmpress.core.artifacts import artifact_folder, fingerprint, read_json, verify
from llmpress.core.errors import ArtifactError


@pytest.fixture
def model(compressed: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed("rtn"), tmp_path / "model"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DOORS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "load_model": llmpress.load_model,
    "verify": verify,
    "fingerprint": fingerprint,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("position", [-1, 20_000], ids=["last", "inner"])
def test_one_flipped_bit_of_the_weights_is_refused(door: str, position: int, model: Path) -> None:
    DOORS[door](model)
    flip(model / "model.safetensors", position)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        DOORS[door](model)


@pytest.mark.parametrize("door", DOORS)
def test_an_edited_configuration_is_refused(door: str, model: Path) -> None:
    config = read_json(model / "config.json")
    config["rms_norm_eps"] *= 2  # loads, and computes something else
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config\.json: .*provenance\.json"):
        DOORS[door](model)


def test_a_forged_list_of_files_is_refused(model: Path) -> None:
    record = read_json(model / "provenance.json")
    name = next(iter(record["files"]))
    record["files"][name] = "0" * 64
    (model / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="fingerprint"):
        verify(model)


def test_a_missing_file_is_named(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        llmpress.load_model(model)


def test_foreign_weights_beside_an_artifact_are_refused(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "other.safetensors"}}
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"other\.safetensors"):
        AutoModelForCausalLM.from_pretrained(model)


def test_a_file_is_read_once_while_it_stays_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmpress.core import artifacts

    verify(model)
    monkeypatch.setattr(artifacts, "sha256", lambda path: pytest.fail(f"{path} was read again"))
    verify(model)
    monkeypatch.undo()
    flip(model / "model.safetensors", -1)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        verify(model)


def test_a_damaged_delta_is_refused(
    tiny_model_folder: Path, compressed_delta: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(compressed_delta, tmp_path / "delta")
    flip(Path(folder) / "delta.safetensors", -1)
    base = llmpress.load_model(tiny_model_folder)
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        llmpress.load_delta(base, folder)


def test_damaged_inputs_stop_an_artifact_before_it_begins(model: Path, tmp_path: Path) -> None:
    flip(model / "model.safetensors", -1)
    out = tmp_path / "out"
    with (
        pytest.raises(ArtifactError, match=r"model\.safetensors"),
        artifact_folder(out, stage="x", settings={}, inputs={"model": model}),
    ):
        pytest.fail("began")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_plain_model_is_known_by_its_content(tiny_model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    (copy / "README.md").write_text("not part of the model")
    assert fingerprint(copy) == fingerprint(tiny_model_folder)
    flip(copy / "model.safetensors", -1)
    assert fingerprint(copy) != fingerprint(tiny_model_folder)
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path))):
        fingerprint(tmp_path)


def test_files_of_an_artifact_can_be_read_by_all(compressed: Make) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in compressed("rtn").iterdir()}
    assert set(modes.values()) == {0o644}, modes
