"""A tied head that is stored beside the embeddings: counted once, written once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmpress
from llmpress.core.artifacts import read_json
from llmpress.models.checkpoints.files import Checkpoint

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def with_head(model: Path, folder: Path, *, added: float = 0.0) -> Path:
    """A copy of a tied model that stores its head too."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDINGS].clone() + added
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def twice(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return with_head(tiny_model_folder, tmp_path / "twice")


def test_a_copy_is_no_tensor_of_its_own(twice: Path, tiny_model_folder: Path) -> None:
    once = Checkpoint(tiny_model_folder)
    assert Checkpoint(twice).names() == once.names()
    sizes = [llmpress.describe(folder)["size"] for folder in (twice, tiny_model_folder)]
    assert sizes[0]["model_weights"] == sizes[1]["model_weights"]


def test_what_is_made_of_it_stores_it_once(
    twice: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    made = [
        llmpress.compress_model(folder, method="rtn", bits=4, group_size=16, out=tmp_path / name)
        for name, folder in (("a", twice), ("b", tiny_model_folder))
    ]
    one, two = (load_file(folder / "model.safetensors") for folder in made)
    assert HEAD not in one
    assert one.keys() == two.keys()
    totals = [read_json(folder / "layers.json")["totals"] for folder in made]
    assert totals[0] == totals[1]
    dense = llmpress.export_dense(made[0], out=tmp_path / "dense")
    assert HEAD not in load_file(dense / "model.safetensors")
    model = llmpress.load_model(dense)
    torch.testing.assert_close(
        model.get_output_embeddings().weight, model.get_input_embeddings().weight, rtol=0, atol=0
    )


def test_a_delta_keeps_no_copy(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    finetuned = with_head(tiny_finetuned_folder, tmp_path / "finetuned")
    delta = llmpress.extract_delta(tiny_model_folder, finetuned, out=tmp_path / "delta")
    assert HEAD not in json.loads((delta / "delta.json").read_text())["exact"]


def test_a_head_of_its_own_stays(tiny_model_folder: Path, tmp_path: Path) -> None:
    own = with_head(tiny_model_folder, tmp_path / "own", added=0.1)
    assert HEAD in Checkpoint(own).names()
