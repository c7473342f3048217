"""Predicted bytes against those of real artifacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.stage import compress_model
from llmpress.core.artifacts import read_json
from llmpress.deltas.compression import compress_delta
from llmpress.methods.base import Method
from llmpress.methods.registry import build_method, known_methods
from llmpress.models.checkpoints.files import CheckpointWriter
from llmpress.planning import ModelShapes, shapes, stages
from llmpress.training.adapters import add_adapters, open_base, save_adapter, save_base
from llmpress.training.settings import FinetuningSettings, TrainingSettings

CPU = torch.device("cpu")
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("bitdelta", {}),
    ("cluscomp", {"bits": 6.0, "iterations": 2}),
    ("cluscomp", {"num_entries": 5, "vector_size": 3, "iterations": 1}),
    ("delta_come", {"bits": 3.0, "precisions": [3, 2]}),
    ("gptq", {"num_bits": 3, "group_size": 48}),
    ("lillama", {"reduction": 0.3, "strategy": "uniform"}),
    ("lillama", {"rank": 16, "form": "factors"}),
    ("magnitude", {"sparsity": 0.5}),
    ("magnitude", {"bits": 2.0}),
    ("rtn", {"num_bits": 4, "group_size": 1000}),
    ("svd", {"keep": 0.5}),
    ("svd", {"rank": 7}),
]
# these may leave layers dense, which a delta cannot have
OF_MODELS_ALONE: list[tuple[str, dict[str, Any]]] = [
    ("lillama", {"reduction": 0.3, "rank_step": 2}),
    ("lillama", {"reduction": 0.1, "strategy": "top"}),
]


def label(value: object) -> str:
    return " ".join(value) if isinstance(value, dict) else str(value)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check(planned: int, method: Method, out: Path) -> None:
    """Exact; where values decide or a budget is spread, headers of tiny files differ as well."""
    exact = method.size_from_shape and not method.spreads_budget
    assert planned == (weight_bytes(out) if exact else pytest.approx(weight_bytes(out), rel=0.05))


def test_every_method_is_tried() -> None:
    assert {name for name, _ in METHODS} == set(known_methods())


@pytest.mark.parametrize(("name", "settings"), METHODS + OF_MODELS_ALONE, ids=label)
def test_compressed_model(
    name: str,
    settings: dict[str, Any],
    tiny: ModelShapes,
    tiny_model_folder: Path,
    calibration: Path,
    tmp_path: Path,
) -> None:
    method, out = build_method(name, settings), tmp_path / "out"
    compress_model(tiny_model_folder, method=method, calibration=calibration, out=out, device=CPU)

    check(stages.compress(tiny, method).artifact_bytes, method, out)


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=label)
def test_compressed_delta(
    name: str,
    settings: dict[str, Any],
    tiny: ModelShapes,
    tiny_delta: Path,
    finetuned_calibration: Path,
    tmp_path: Path,
) -> None:
    method, out = build_method(name, settings), tmp_path / "out"
    compress_delta(
        tiny_delta, method=method, calibration=finetuned_calibration, out=out, device=CPU
    )

    changed = list(read_json(tiny_delta / "delta.json")["exact"])
    check(stages.compress_delta(tiny, method, changed).artifact_bytes, method, out)


def test_delta(tiny: ModelShapes, tiny_delta: Path) -> None:
    changed = list(read_json(tiny_delta / "delta.json")["exact"])
    assert changed  # the norms

    assert stages.extract_delta(tiny, changed).artifact_bytes == weight_bytes(tiny_delta)


def test_calibration(tiny: ModelShapes, calibration: Path) -> None:
    settings = CalibrationSettings(("code",), windows=4, length=64, validation_windows=1)
    assert stages.calibrate(tiny, settings).artifact_bytes == weight_bytes(calibration)


def test_trained_model(tiny: ModelShapes, tiny_model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)

    needed = stages.train(tiny, TrainingSettings("tiny", 1, task="sums"), "")

    assert needed.artifact_bytes == weight_bytes(tmp_path)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_adapters(
    quantized: bool, tiny: ModelShapes, tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = open_base(tiny_model_folder, quantize=quantized, device=CPU)
    if quantized:
        save_base(base, tiny_model_folder, tmp_path)
    parameters = add_adapters(base, rank=4, alpha=8, seed=0)
    stored = {name: p.detach().to(torch.bfloat16) for name, p in parameters.items()}
    save_adapter(stored, tmp_path, model="tiny", rank=4, alpha=8)
    settings = FinetuningSettings(1, 1e-3, rank=4)

    needed = stages.train(tiny, settings, "qlora" if quantized else "lora")

    if not quantized:
        assert needed.artifact_bytes == weight_bytes(tmp_path)
        return
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("base/*.safetensors")]
    payload = sum(t.nbytes for file in files for t in load_file(file).values())
    # bitsandbytes adds tables and a description of some kilobyte to each of the tiny layers
    assert abs(needed.artifact_bytes - payload) < 0.02 * payload + 1250 * len(tiny.linears)


def test_shards(tmp_path: Path) -> None:
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

    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert shapes.files_bytes([tensors], 500) == weight_bytes(tmp_path)


def test_header_counts_offsets_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Wide dtypes come first: a large tensor at the front would lengthen all offsets after it."""
    tensors = {"a": torch.zeros(10**6, dtype=torch.uint8)}
    tensors |= {f"b{i}": torch.zeros(1, dtype=torch.float32) for i in range(50)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert shapes.files_bytes([tensors]) == weight_bytes(tmp_path)
