"""Compressed folders: written packed, loaded by transformers, refused when damaged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.artifacts import read_json
from llmpress.core.errors import ArtifactError, NumericalError, SourceError
from llmpress.core.resume import BlockStore
from llmpress.methods.registry import method_class
from llmpress.models.architectures import replace_module
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter
from llmpress.models.loading import dequantized, load_model, skeleton
from llmpress.nn.layers import CompressedLinear

CPU = torch.device("cpu")
METHODS = {
    "rtn": {"num_bits": 4, "group_size": 16},
    "cluscomp": {"bits": 4.0},
    "lillama": {"reduction": 0.2, "start": "weights"},
    "bitdelta": {"scale": "mean"},
    "magnitude": {"sparsity": 0.5},
}


@pytest.fixture
def compress(tiny_model_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    def run(name: str) -> Path:
        source = Checkpoint(tiny_model_folder)
        empty = skeleton(source)
        out = tmp_path / name
        out.mkdir()
        layers = compress_layers(
            model_shapes(empty),
            source,
            method_class(name)(**METHODS[name]),
            None,
            model_weights=empty.num_parameters(),
            seed=0,
            device=CPU,
            store=BlockStore(name, {}, tmp_path / "scratch"),
        )
        write_compressed_model(source, layers, empty.num_parameters(), out)
        return out

    return run


@pytest.mark.parametrize("name", METHODS)
def test_transformers_loads_what_was_stored(
    name: str, compress: Callable[[str], Path], tiny_model_folder: Path, tiny_windows: Tensor
) -> None:
    folder = compress(name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, CompressedLinear)}
    records = read_json(folder / "layers.json")["layers"]
    assert sorted(layers) == sorted(r["name"] for r in records if r["kind"] != "dense")
    by_hand = load_model(tiny_model_folder)
    for layer_name, layer in layers.items():
        dense = by_hand.get_submodule(layer_name)
        dense.weight.data = layer.dequantize().detach().float()
    for left in [record["name"] for record in records if record["kind"] == "dense"]:
        dense = by_hand.get_submodule(left)
        dense.weight.data = dense.weight.data.bfloat16().float()
    with torch.no_grad():
        expected = by_hand(tiny_windows[:2]).logits
        torch.testing.assert_close(loaded(tiny_windows[:2]).logits, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            dequantized(loaded)(tiny_windows[:2]).logits, expected, rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("name", METHODS)
def test_stored_bits_are_the_files_bytes(name: str, compress: Callable[[str], Path]) -> None:
    folder = compress(name)
    content = read_json(folder / "layers.json")
    compressed = {r["name"]: r for r in content["layers"] if r["kind"] != "dense"}
    sizes = dict.fromkeys(compressed, 0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if (layer := key.rpartition(".")[0]) in sizes:
                tensor = file.get_tensor(key)
                sizes[layer] += 8 * tensor.numel() * tensor.element_size()
    assert sizes == {n: r["stored_bits"] for n, r in compressed.items()}
    assert content["totals"]["stored_bits"] == sum(sizes.values())


def test_save_and_reload_is_bit_identical(compress: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compress("cluscomp"), dtype="auto")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=0)


def test_a_compressed_model_generates(
    compress: Callable[[str], Path], tiny_windows: Tensor
) -> None:
    model = load_model(compress("cluscomp"))
    tokens = model.generate(tiny_windows[:1, :8], max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 8


def test_another_format_version_is_refused(compress: Callable[[str], Path]) -> None:
    folder = compress("rtn")
    config = read_json(folder / "config.json")
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="version 99"):
        load_model(folder)


@pytest.mark.parametrize("damage", [{"kind": "cubic"}, {"spec": {"rank": 2}}, {"spec": None}])
def test_a_damaged_entry_of_a_layer_is_named(
    compress: Callable[[str], Path], damage: dict[str, Any]
) -> None:
    folder = compress("rtn")
    config = json.loads((folder / "config.json").read_text())
    name, entry = next(iter(config["quantization_config"]["layers"].items()))
    entry.update(damage)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=re.escape(name)):
        load_model(folder)


def test_a_truncated_file_is_named(compress: Callable[[str], Path]) -> None:
    weights = compress("rtn") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_model(weights.parent)


def test_pickle_weights_are_never_opened(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(SourceError, match=re.escape(str(tmp_path))):
        Checkpoint(tmp_path)


def test_a_nan_weight_names_its_layer(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_model_folder)
    bad = "model.layers.1.self_attn.k_proj"

    class Poisoned:
        def names(self) -> list[str]:
            return source.names()

        def tensor(self, name: str) -> Tensor:
            tensor = source.tensor(name)
            return tensor * torch.nan if name == f"{bad}.weight" else tensor

    layers = compress_layers(
        model_shapes(source.skeleton()),
        Poisoned(),
        method_class("rtn")(num_bits=4, group_size=16),
        None,
        model_weights=1,
        seed=0,
        device=CPU,
        store=BlockStore("nan", {}, tmp_path),
    )
    with pytest.raises(NumericalError, match=bad):
        list(layers)


def test_shards_are_written_with_an_index(tmp_path: Path, tiny_model_folder: Path) -> None:
    source = Checkpoint(tiny_model_folder)
    writer = CheckpointWriter(tmp_path, max_shard_bytes=200_000)
    for name in source.names():
        writer.add(name, source.tensor(name))
    writer.close()
    (tmp_path / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    again = Checkpoint(tmp_path)
    assert again.names() == source.names()
    for name in source.names():
        torch.testing.assert_close(again.tensor(name), source.tensor(name), rtol=0, atol=0)


def test_replacing_a_module_replaces_only_it(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder)
    before = dict(model.named_modules())
    replace_module(model, "model.layers.0.mlp.up_proj", torch.nn.Identity())
    changed = [n for n, m in model.named_modules() if before[n] is not m]
    assert changed == ["model.layers.0.mlp.up_proj"]
