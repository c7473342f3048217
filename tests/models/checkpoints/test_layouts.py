"""Which of a folder's files are a model's weights, and which of their tensors it has."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from llmpress.core.errors import ArtifactError, LLMPressError, SourceError
from llmpress.models.checkpoints.files import Checkpoint

INDEX = "model.safetensors.index.json"


def in_shards(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()


def stale_index(folder: Path) -> None:
    newer = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    in_shards(folder)
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})


def stale_index_without_shards(folder: Path) -> None:
    stale_index(folder)
    for shard in folder.glob("model-0*"):
        shard.unlink()


def renamed_shards(folder: Path) -> None:
    in_shards(folder)
    for shard in folder.glob("model-0*"):
        shard.rename(folder / f"pytorch_{shard.name}")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: f"pytorch_{file}" for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def consolidated_beside(folder: Path) -> None:
    newer = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    save_file(newer, folder / "consolidated.safetensors")


def variant_beside(folder: Path) -> None:
    newer = {n: t.half() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(newer, folder / "model.fp16.safetensors", metadata={"format": "pt"})


def pickle_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def named_in_the_configuration(folder: Path) -> None:
    stale_index(folder)
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = INDEX
    (folder / "config.json").write_text(json.dumps(config))


def without_prefix(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    config = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config)


def old_buffers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    tensors["model.layers.3.mlp.gate_proj.weight"] = torch.ones(176, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


READ = (
    in_shards,
    stale_index,
    stale_index_without_shards,
    renamed_shards,
    consolidated_beside,
    variant_beside,
    pickle_beside,
    named_in_the_configuration,
    without_prefix,
    old_buffers,
)


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.mark.parametrize("layout", READ)
def test_the_weights_are_those_that_transformers_opens(
    layout: Callable[[Path], None], folder: Path
) -> None:
    layout(folder)
    expected = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.tensor(name), tensor.data, rtol=0, atol=0)


def test_tensors_without_a_place_are_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old_buffers(folder)
    with caplog.at_level(logging.WARNING):
        ignored = [Checkpoint(folder).ignored for _ in range(2)]
    assert ignored[0] == ignored[1]
    assert len(ignored[0]) == 4
    said = [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()]
    assert len(said) == 1
    assert ignored[0][0] in said[0]


def pickled_shards(folder: Path) -> None:
    in_shards(folder)
    text = (folder / INDEX).read_text()
    for shard in folder.glob("model-0*"):
        shard.rename(shard.with_suffix(".bin"))
        text = text.replace(shard.name, shard.with_suffix(".bin").name)
    (folder / INDEX).write_text(text)


def index_alone(folder: Path) -> None:
    in_shards(folder)
    for shard in folder.glob("model-0*"):
        shard.unlink()


def renamed_to(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return rename


@pytest.mark.parametrize(
    ("layout", "kind", "named"),
    [
        (pickled_shards, SourceError, r"model-00001-of-\d+\.bin"),
        (index_alone, ArtifactError, r"model-00001-of-\d+\.safetensors"),
        (renamed_to("consolidated.safetensors"), ArtifactError, "model.safetensors"),
        (renamed_to("model.fp16.safetensors"), ArtifactError, "model.safetensors"),
        (renamed_to("pytorch_model.bin"), SourceError, "pytorch_model.bin"),
    ],
    ids=["pickled shards", "an index alone", "consolidated", "a variant", "a pickle"],
)
def test_what_transformers_does_not_open_is_refused(
    layout: Callable[[Path], None], kind: type[LLMPressError], named: str, folder: Path
) -> None:
    layout(folder)
    with pytest.raises(kind, match=named) as refused:
        Checkpoint(folder)
    assert "\n" not in str(refused.value)
