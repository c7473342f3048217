"""What is written can be opened; what could not be is refused, before anything is computed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import WEIGHT_METHODS, Make
from torch import Tensor

import llmpress
from llmpress.core.errors import ArtifactError
from llmpress.models.checkpoints.files import CheckpointWriter

NORM = "model.layers.1.input_layernorm.weight"
Edit = Callable[[dict[str, Tensor]], object]
DAMAGE: dict[str, Edit] = {
    "missing": lambda tensors: tensors.pop(NORM),
    "cut": lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}),
}


def spoilt(source: Path, folder: Path, edit: Edit) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("way", DAMAGE)
def test_a_source_without_a_norm_is_refused_at_once(
    way: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = spoilt(tiny_model_folder, tmp_path / "source", DAMAGE[way])
    method = llmpress.build_method("rtn", {"num_bits": 4})
    monkeypatch.setattr(type(method), "compress", None)  # nothing is computed
    with pytest.raises(ArtifactError, match=NORM):
        llmpress.compress_model(source, method=method, out=tmp_path / "out")
    with pytest.raises(ArtifactError, match=NORM):
        llmpress.export_dense(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["compress", "export", "finetune", "train"])
def test_nothing_that_cannot_be_opened_is_put_in_place(
    kind: str, compressed: Make, tiny_model_folder: Path, calibration: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    packed, out = compressed("cluscomp"), tmp_path / "out"
    add = CheckpointWriter.add

    def lossy(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        if name != NORM:
            add(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", lossy)
    actions: dict[str, Callable[[], Path]] = {
        "compress": lambda: llmpress.compress_model(
            tiny_model_folder, method="rtn", bits=4, out=out
        ),
        "export": lambda: llmpress.export_dense(packed, out=out),
        "finetune": lambda: llmpress.finetune_model(
            packed, original=tiny_model_folder, calibration=calibration, epochs=1,
            learning_rate=1e-3, batch_size=2, out=out,
            method=llmpress.build_method("cluscomp", WEIGHT_METHODS["cluscomp"]),
        ),
        "train": lambda: llmpress.train_model(
            packed, original=tiny_model_folder, text=["x = 1\n" * 900] * 5, steps=1,
            learning_rate=1e-3, batch_size=2, length=32, held_out=2, out=out,
        ),
    }  # fmt: skip
    with pytest.raises(ArtifactError, match=NORM):
        actions[kind]()
    assert not out.exists()
    assert torch.isfinite(load_file(packed / "model.safetensors")[NORM]).all()
