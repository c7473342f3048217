import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_artifacts import Make

import llmpress
from llmpress.core.artifacts import artifact_folder, read_provenance
from llmpress.core.records import LayerRecord, Records, total_size, write_records
from llmpress.evaluation.metrics import Cost
from llmpress.evaluation.sizes import compressed_size, cost, delta_size, model_size

LINEAR_WEIGHTS = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 176 * 3)
MODEL_WEIGHTS = LINEAR_WEIGHTS + 512 * 64 + 64 * 7


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.usefixtures("project")
def test_a_model_is_counted_with_its_tied_head_once() -> None:
    folder = Path("data/models/tiny")
    size = model_size(folder)
    assert size.bits_per_weight == 32
    assert size.compressed_weights == LINEAR_WEIGHTS
    assert size.stored_bits == 32 * LINEAR_WEIGHTS
    assert size.model_weights == MODEL_WEIGHTS
    assert size.model_bytes == stored_bytes(folder)
    assert size.ratio == pytest.approx(2 * MODEL_WEIGHTS / stored_bytes(folder))


@pytest.mark.usefixtures("project")
def test_a_compressed_model_is_measured_against_the_whole_model() -> None:
    folder = Path("data/compressed/rtn")
    size = compressed_size(folder)
    bits = 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if "_proj." in name:
                tensor = file.get_tensor(name)
                bits += 8 * tensor.numel() * tensor.element_size()
    assert size.stored_bits == bits
    assert size.bits_per_weight == pytest.approx(bits / LINEAR_WEIGHTS)
    assert size.ratio == pytest.approx(2 * MODEL_WEIGHTS / stored_bytes(folder))


@pytest.mark.usefixtures("project")
def test_a_delta_is_measured_against_the_whole_delta() -> None:
    folder = Path("data/compressed/delta")
    exact = json.loads((folder / "delta.json").read_text(encoding="utf-8"))["exact"]
    assert exact  # norms change too
    size = delta_size(folder)
    assert size.compressed_weights == LINEAR_WEIGHTS
    assert size.model_bytes == stored_bytes(folder)
    bf16_bytes = 2 * (LINEAR_WEIGHTS + sum(exact.values()))
    assert size.ratio == pytest.approx(bf16_bytes / stored_bytes(folder))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("folder", "applies"),
    [("data/models/tiny", False), ("data/compressed/rtn", True), ("data/compressed/delta", True)],
)
def test_compressing_costs_and_fetching_does_not(folder: str, *, applies: bool) -> None:
    provenance = read_provenance(Path(folder))
    assert cost(Path(folder)) == Cost(
        compress_seconds=provenance["seconds"] if applies else 0.0,
        compress_peak_memory_bytes=provenance["peak_memory_bytes"] if applies else 0,
        finetune_seconds=0.0,
        finetune_peak_memory_bytes=0,
    )


def test_finetuning_adds_its_own_cost(tmp_path: Path) -> None:
    with artifact_folder(tmp_path / "out", stage="finetune", settings={}, inputs={}) as folder:
        layers = tuple(
            LayerRecord("layer", "sign", {}, (8, 10), 80, 1.0, None, None, seconds)
            for seconds in (1.5, 2.0)
        )
        write_records(folder, Records(layers, total_size(layers, 160)))
    found = cost(tmp_path / "out")
    provenance = read_provenance(tmp_path / "out")
    assert (found.compress_seconds, found.compress_peak_memory_bytes) == (3.5, 0)
    assert found.finetune_seconds == provenance["seconds"]
    assert found.finetune_peak_memory_bytes == provenance["peak_memory_bytes"]


def test_bits_are_those_of_the_linears_whatever_the_largest_tensor_is(
    compressed: Make, tmp_path: Path
) -> None:
    dense = llmpress.export_dense(compressed("rtn"), out=tmp_path / "dense", dtype="bfloat16")
    assert load_file(dense / "model.safetensors")["model.embed_tokens.weight"].itemsize == 4
    assert model_size(dense).bits_per_weight == 16
