"""Predicted bytes against those of real artifacts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_examples import CALIBRATION
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmpress.compression.stage import compress_model
from llmpress.core.artifacts import read_json
from llmpress.deltas.compression import compress_delta
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.files import CheckpointWriter, copy_companions
from llmpress.planning import ModelShapes, sizes, stages
from llmpress.training.adapters import add_adapters, open_base, save_adapter, save_base

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("bitdelta", {}),
    ("cluscomp", {"bits": 6.0, "iterations": 2}),
    ("cluscomp", {"num_entries": 5, "vector_size": 3, "iterations": 1}),
    ("delta_come", {"bits": 3.0, "precisions": [3, 2]}),
    ("gptq", {"num_bits": 3, "group_size": 48}),
    ("lillama", {"reduction": 0.3, "strategy": "uniform"}),
    ("lillama", {"reduction": 0.3, "rank_step": 2}),
    ("lillama", {"rank": 16, "form": "factors"}),
    ("lillama", {"reduction": 0.1, "strategy": "top"}),
    ("magnitude", {"sparsity": 0.5}),
    ("magnitude", {"bits": 2.0}),
    ("rtn", {"num_bits": 4, "group_size": 1000}),
    ("svd", {"keep": 0.5}),
    ("svd", {"rank": 7}),
]
IDS = [f"{name} {' '.join(settings)}".strip() for name, settings in METHODS]
# what is spread by loss or from one end may leave layers dense, which a delta cannot have
DELTA_METHODS = [
    (n, s) for n, s in METHODS if n != "lillama" or "rank" in s or s.get("strategy") == "uniform"
]
DELTA_IDS = [f"{name} {' '.join(settings)}".strip() for name, settings in DELTA_METHODS]


def tensor_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def check(predicted: sizes.ArtifactSize, folder: Path) -> None:
    assert predicted.exact
    assert predicted.tensor_bytes == tensor_bytes(folder)
    assert predicted.num_bytes == pytest.approx(folder_bytes(folder), rel=0.02)


def check_layers(
    predicted: sizes.ArtifactSize, method: Method, model: ModelShapes, folder: Path
) -> None:
    """Exact, or where the values decide, what the layers store within 2 %, dense ones in bf16.

    Then the number of tensors is not known either, and their names take as much room in a tiny
    file as they do.
    """
    if predicted.exact:
        check(predicted, folder)
        return
    layers = sizes.planned_layers(model, method)
    stored_bits = sum(layer["stored_bits"] for layer in read_json(folder / "layers.json")["layers"])
    planned_bits = sum(
        16 * math.prod(model.linears[name]) if layer is None else layer.stored_bits()
        for name, layer in layers.items()
    )
    assert planned_bits == pytest.approx(stored_bits, rel=0.02)
    assert predicted.num_bytes == pytest.approx(folder_bytes(folder), rel=0.05)


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=IDS)
def test_compressed_model(
    name: str,
    settings: dict[str, Any],
    tiny: ModelShapes,
    tiny_model_folder: Path,
    tiny_calibration: Path,
    tmp_path: Path,
) -> None:
    method = build_method(name, settings, "test")
    compress_model(
        tiny_model_folder,
        method=method,
        calibration=tiny_calibration,
        seed=0,
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        out=tmp_path / "out",
    )

    check_layers(stages.compress(tiny, method).artifact, method, tiny, tmp_path / "out")


@pytest.mark.parametrize(("name", "settings"), DELTA_METHODS, ids=DELTA_IDS)
def test_compressed_delta(
    name: str,
    settings: dict[str, Any],
    tiny: ModelShapes,
    tiny_delta: Path,
    tiny_finetuned_calibration: Path,
    tmp_path: Path,
) -> None:
    method = build_method(name, settings, "test")
    compress_delta(
        tiny_delta,
        method=method,
        calibration=tiny_finetuned_calibration,
        seed=0,
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        out=tmp_path / "out",
    )

    exact_tensors = list(read_json(tiny_delta / "delta.json")["exact"])
    predicted = stages.compress_delta(tiny, method, exact_tensors).artifact
    check_layers(predicted, method, tiny, tmp_path / "out")


def test_delta(tiny: ModelShapes, tiny_delta: Path) -> None:
    exact_tensors = list(read_json(tiny_delta / "delta.json")["exact"])
    assert exact_tensors  # the norms

    check(sizes.delta_size(tiny, exact_tensors), tiny_delta)


def test_calibration(tiny: ModelShapes, tiny_calibration: Path) -> None:
    check(stages.calibrate(tiny, CALIBRATION).artifact, tiny_calibration)


def test_trained_model(tiny: ModelShapes, tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)

    assert sizes.trained_model_size(tiny).tensor_bytes == tensor_bytes(tmp_path)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_adapters(
    quantized: bool, tiny: ModelShapes, tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = open_base(tiny_model_folder, quantize=quantized, device=torch.device("cpu"))
    if quantized:
        save_base(base, tiny_model_folder, tmp_path)
    parameters = add_adapters(base, rank=4, alpha=8, seed=0)
    stored = {name: p.detach().to(torch.bfloat16) for name, p in parameters.items()}
    save_adapter(stored, tmp_path, model="tiny", rank=4, alpha=8)
    copy_companions(tiny_model_folder, tmp_path)

    predicted = sizes.adapter_size(tiny, 4, quantized=quantized)

    if not quantized:
        assert predicted.exact
        assert predicted.tensor_bytes == tensor_bytes(tmp_path)
        return
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("base/*.safetensors")]
    payload = sum(t.numel() * t.element_size() for file in files for t in load_file(file).values())
    # bitsandbytes adds a description of some hundred bytes to each of the tiny layers
    assert abs(predicted.tensor_bytes - payload) < 0.02 * payload + 150 * len(tiny.linears)


def test_shards_and_index(tmp_path: Path) -> None:
    """Names of different lengths, dtypes out of order, one tensor larger than a shard."""
    dtypes = [torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.float16]
    tensors = {
        f"layer.{i}.{'x' * i}": torch.zeros(i * 7, 3, dtype=dtype)
        for i, dtype in enumerate(dtypes * 3)
    }
    writer = CheckpointWriter(tmp_path, max_shard_bytes=500)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()

    shards = sizes.shards(tensors, 500)

    assert len(shards) == len(list(tmp_path.glob("*.safetensors"))) > 3
    assert sum(map(sizes.safetensors_bytes, shards)) == tensor_bytes(tmp_path)


def test_header_counts_offsets_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Wide dtypes come first: a large tensor at the front would lengthen all offsets after it."""
    tensors = {"a": torch.zeros(10**6, dtype=torch.uint8)}
    tensors |= {f"b{i}": torch.zeros(1, dtype=torch.float32) for i in range(50)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert sizes.safetensors_bytes(tensors) == tensor_bytes(tmp_path)
