"""What is not compressed keeps its dtype and its bytes, in artifacts, exports and memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmpress
from llmpress.core.artifacts import read_json, write_json
from llmpress.models.checkpoints.files import Checkpoint, block_linears

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linears(folder: Path) -> set[str]:
    """Names of the weights that a method may compress."""
    return {f"{n}.weight" for b in block_linears(Checkpoint(folder).skeleton()) for n in b}


def mixed(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The model in ``dtype``, every second tensor outside of its linears in fp32."""
    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    rest = sorted(name for name in tensors if tensors[name].ndim < 2 or "gate.weight" in name)
    for name in rest[::2]:
        tensors[name] = tensors[name].float() + 0.001 * torch.rand(tensors[name].shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rest(folder: Path, left: set[str]) -> dict[str, Tensor]:
    """Stored tensors but those of linears and of compressed layers."""
    layers = read_json(folder / "config.json").get("quantization_config", {}).get("layers", {})
    weights = {name.removesuffix(".weight") for name in left} | set(layers)
    checkpoint = Checkpoint(folder)
    return {
        name: checkpoint.tensor(name)
        for name in checkpoint.names()
        if name.rpartition(".")[0] not in weights or name.endswith(".bias")
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def in_memory(model: PreTrainedModel, left: set[str]) -> Iterator[tuple[str, Tensor]]:
    fused = {".".join(name.split(".")[:-3]) for name in left if ".experts." in name}
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        in_experts = any(f"{owner}.".startswith(f"{group}.") for group in fused)
        if name.endswith(".bias") or not (f"{owner}.weight" in left or in_experts):
            yield name, tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rest_of_every_architecture_keeps_its_bytes(
    dtype: torch.dtype, architecture_folder: Path, tmp_path: Path
) -> None:
    source = mixed(architecture_folder, tmp_path / "source", dtype)
    left = linears(source)
    packed = llmpress.compress_model(
        source, method="rtn", bits=4, group_size=16, out=tmp_path / "packed"
    )
    dense = llmpress.export_dense(packed, out=tmp_path / "dense", dtype=dtype)
    expected = rest(source, left)
    assert {tensor.dtype for tensor in expected.values()} >= {dtype, torch.float32}
    assert_same(rest(packed, left), expected)
    assert_same(rest(dense, left), expected)
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (source, packed, dense)
    ]
    for model in models[1:]:
        assert_same(dict(in_memory(model, left)), dict(in_memory(models[0], left)))
        assert model.dtype == models[0].dtype


def test_without_a_stated_dtype_it_is_loaded_as_its_source(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = mixed(tiny_model_folder, tmp_path / "source", torch.bfloat16)
    config = read_json(source / "config.json")
    del config["dtype"]
    write_json(source / "config.json", config)
    packed = llmpress.compress_model(source, method="rtn", bits=4, out=tmp_path / "packed")
    assert AutoModelForCausalLM.from_pretrained(packed, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_that_stays_dense_takes_sixteen_bits(
    dtype: torch.dtype, tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = mixed(tiny_model_folder, tmp_path / "source", dtype)
    packed = llmpress.compress_model(
        source, method="lillama", text=["x = 1\n" * 900] * 5, windows=2, length=32, reduction=0.05,
        out=tmp_path / "packed",
    )  # fmt: skip
    records = read_json(packed / "layers.json")["layers"]
    left = [record for record in records if record["kind"] == "dense"]
    assert left
    for record in left:
        weight = Checkpoint(packed).tensor(f"{record['name']}.weight")
        assert record["stored_bits"] == 8 * weight.nbytes == 16 * weight.numel()
        assert weight.dtype == (dtype if dtype.itemsize == 2 else torch.bfloat16)


def test_a_delta_carries_small_steps_of_any_tensor(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = mixed(tiny_model_folder, tmp_path / "base", torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(
        tmp_path / "new"
    )
    file = tmp_path / "new/model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if tensors[name].ndim == 1:
            tensors[name] = tensors[name] + torch.linspace(0, 0.001, len(tensors[name]))
    save_file(tensors, file, metadata={"format": "pt"})
    delta = llmpress.extract_delta(base, tmp_path / "new", out=tmp_path / "delta")
    small = llmpress.compress_delta(delta, method="svd", rank=4, out=tmp_path / "small")
    whole = llmpress.export_dense(base, delta=small, out=tmp_path / "whole")
    applied = llmpress.load_finetuned(base, small)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            for found in (load_file(whole / "model.safetensors"), applied.state_dict()):
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
