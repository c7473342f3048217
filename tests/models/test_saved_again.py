"""A compressed model that transformers saved again: opened, described, evaluated, finetuned."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import WEIGHT_METHODS, Make
from tiny_models import library_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmpress
from llmpress.core.artifacts import PROVENANCE
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.records import DENSE

WAYS: dict[str, dict[str, Any]] = {"whole": {}, "shards": {"max_shard_size": "50KB"}}


@pytest.fixture
def again(tmp_path: Path) -> Callable[..., Path]:
    def save(folder: Path, out: Path = tmp_path / "again", **settings: Any) -> Path:
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out, **settings)
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
        return out

    return save


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_it_is_described_as_the_artifact(
    name: str, way: str, compressed: Make, again: Callable[..., Path]
) -> None:
    found = llmpress.describe(again(compressed(name), **WAYS[way]))
    known = llmpress.describe(compressed(name))
    assert found["kind"] == known["kind"] == "compressed model"
    assert known["verified"]
    assert not found["verified"]
    for key in ("bits_per_weight", "compressed_weights", "stored_bits", "model_weights"):
        if not any(layer["kind"] == DENSE for layer in known["layers"]):
            assert found["size"][key] == known["size"][key]
    assert [layer["name"] for layer in found["layers"]] == [x["name"] for x in known["layers"]]
    assert all(layer["relative_weight_error"] is None for layer in found["layers"])


def test_it_is_compared_exported_and_trained(
    compressed: Make, tiny_model_folder: Path, calibration: Path, again: Callable[..., Path],
    tmp_path: Path, tiny_windows: Tensor,
) -> None:  # fmt: skip
    packed = compressed("cluscomp")
    saved = again(packed)
    text = ["\n\n".join(library_text(("asyncio",)))]
    one, two = (
        llmpress.compare_models(tiny_model_folder, folder, text=text, windows=2, length=32)
        for folder in (packed, saved)
    )
    assert one.texts == two.texts
    assert one.other_size.bits_per_weight == two.other_size.bits_per_weight
    for number, folder in enumerate((packed, saved)):
        llmpress.export_dense(folder, out=tmp_path / f"dense{number}")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"dense{n}") for n in (0, 1)]
    with torch.no_grad():
        first, second = (model(tiny_windows[:1]).logits for model in models)
    torch.testing.assert_close(first, second)
    settings = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "calibration": calibration}
    with pytest.raises(ConfigError, match="method"):
        llmpress.finetune_model(
            saved, original=tiny_model_folder, out=tmp_path / "tuned", **settings
        )
    llmpress.finetune_model(
        saved, original=tiny_model_folder, out=tmp_path / "tuned", **settings,
        method=llmpress.build_method("cluscomp", WEIGHT_METHODS["cluscomp"]),
    )  # fmt: skip
    assert llmpress.describe(tmp_path / "tuned")["size"] is not None
    with pytest.raises(ArtifactError, match="compressed already"):
        llmpress.compress_model(saved, method="rtn", bits=4, out=tmp_path / "twice")


@pytest.mark.parametrize("way", WAYS)
def test_saved_over_itself_it_says_what_to_delete(
    way: str, compressed: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(compressed("rtn"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(folder, **WAYS[way])
    with pytest.raises(ArtifactError, match=rf"delete {PROVENANCE}"):
        llmpress.load_model(folder)
    (folder / PROVENANCE).unlink()
    assert llmpress.describe(folder)["kind"] == "compressed model"
    llmpress.load_model(folder)


def test_what_would_be_opened_as_another_model_is_not_saved(
    compressed: Make, tiny_model_folder: Path, compressed_delta: Path, tmp_path: Path
) -> None:
    model = llmpress.load_finetuned(tiny_model_folder, compressed_delta)
    with pytest.raises(ArtifactError, match=compressed_delta.name):
        model.save_pretrained(tmp_path / "one")
    llmpress.remove_delta(model).save_pretrained(tmp_path / "base")
    llmpress.load_model(tmp_path / "base")
    for folder in (compressed("rtn"), tiny_model_folder):
        dense = llmpress.load_model(folder)
        if folder == tiny_model_folder:
            llmpress.load_delta(dense, compressed_delta)
        with pytest.raises(ArtifactError, match="dequantized"):
            llmpress.dequantized(dense).save_pretrained(tmp_path / "two")
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("architecture", ["mixtral"], indirect=True)
def test_experts_taken_apart_for_a_delta_are_not_saved_either(
    architecture_folder: Path, tmp_path: Path
) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(architecture_folder)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    delta = llmpress.extract_delta(architecture_folder, tmp_path / "tuned", out=tmp_path / "delta")
    small = llmpress.compress_delta(delta, method="svd", rank=4, out=tmp_path / "small")
    model = llmpress.load_finetuned(architecture_folder, small)
    for carrying in (model, llmpress.remove_delta(model)):
        with pytest.raises(ArtifactError):
            carrying.save_pretrained(tmp_path / "out")
    packed = llmpress.compress_model(
        architecture_folder, method="rtn", bits=4, group_size=16, out=tmp_path / "packed"
    )
    llmpress.load_model(packed).save_pretrained(tmp_path / "again")
