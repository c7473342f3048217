"""Artifacts of every method on a GPU, against the same artifacts on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import CPU, WEIGHT_METHODS, Make, calibrate_tiny
from torch import Tensor

from llmpress.compression.stage import compress_model
from llmpress.deltas.applying import load_delta
from llmpress.methods.registry import build_method
from llmpress.models.loading import load_model
from llmpress.serving.bank import DeltaBank
from llmpress.tuning.stage import finetune_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
GPU = torch.device("cuda")
METHODS = list(WEIGHT_METHODS)
TUNABLE = ("cluscomp", "lillama")


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_cpu(method: str, compressed: Make, tiny_windows: Tensor) -> None:
    folder = compressed(method)
    with torch.no_grad():
        expected = load_model(folder)(tiny_windows).logits
        found = load_model(folder, device="cuda")(tiny_windows.to(GPU)).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_text_is_generated(
    method: str, cache: str, compressed: Make, tiny_windows: Tensor
) -> None:
    folder = compressed(method)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    if cache == "static":
        settings["cache_implementation"] = "static"
    prompt = tiny_windows[:2, :7]
    expected = load_model(folder).generate(prompt, max_new_tokens=12, do_sample=False)
    found = load_model(folder, device="cuda").generate(prompt.to(GPU), **settings)
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_stays_close(
    method: str, dtype: torch.dtype, compressed: Make, tiny_windows: Tensor
) -> None:
    folder = compressed(method)
    with torch.no_grad():
        expected = load_model(folder)(tiny_windows).logits.log_softmax(-1)
        model = load_model(folder, device="cuda", dtype=dtype)
        found = model(tiny_windows.to(GPU)).logits.float().cpu().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 <= float(divergence) + 1e-6 < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_can_be_captured_in_a_graph(
    method: str, compressed: Make, tiny_windows: Tensor
) -> None:
    model = load_model(compressed(method), device="cuda", dtype=torch.bfloat16)
    tokens = tiny_windows[:1, :1].to(GPU)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model(tokens, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(tokens, use_cache=False).logits
        graph.replay()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_compiles_whole(method: str, compressed: Make, tiny_windows: Tensor) -> None:
    model = load_model(compressed(method), device="cuda")
    tokens = tiny_windows[:2, :3].to(GPU)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            found = compiled(tokens, use_cache=False).logits.clone()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def compress_on(
    device: torch.device, method: str, model: Path, calibration: Path, out: Path
) -> list[dict[str, Any]]:
    compress_model(
        model,
        method=build_method(method, WEIGHT_METHODS[method], method),
        calibration=calibration,
        seed=0,
        device=device,
        scratch=out.with_name(f"scratch-{out.name}"),
        out=out,
    )
    layers: list[dict[str, Any]] = json.loads((out / "layers.json").read_text())["layers"]
    return layers


@pytest.mark.parametrize("method", METHODS)
def test_compressing_gives_what_the_cpu_gives(
    method: str, tiny_model_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    expected, found, again = (
        compress_on(device, method, tiny_model_folder, calibration, tmp_path / name)
        for device, name in ((CPU, "cpu"), (GPU, "gpu"), (GPU, "again"))
    )
    for slow, fast in zip(expected, found, strict=True):
        assert fast["stored_bits"] == slow["stored_bits"]
        error = slow["relative_output_error"]
        assert fast["relative_output_error"] == pytest.approx(error, rel=0.1, abs=1e-4)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("gpu", "again")]
    assert weights[0] == weights[1]
    assert [r["relative_output_error"] for r in found] == [
        r["relative_output_error"] for r in again
    ]


def test_calibrating_gives_what_the_cpu_gives(tiny_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = [
        calibrate_tiny(tiny_model_folder, tmp_path / device.type, device=device)
        for device in (CPU, GPU)
    ]
    names = sorted(p.relative_to(folders[0]) for p in folders[0].rglob("*.safetensors"))
    assert names
    for name in names:
        expected, found = (load_file(folder / name) for folder in folders)
        for key, tensor in expected.items():
            scale = float(tensor.abs().max()) if tensor.is_floating_point() else 0
            torch.testing.assert_close(
                found[key], tensor, rtol=2e-2, atol=1e-2 * scale, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("method", TUNABLE)
def test_finetuning_helps_on_a_gpu_too(
    method: str, compressed: Make, tiny_model_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    finetune_model(
        compressed(method),
        original=tiny_model_folder,
        calibration=calibration,
        out=out,
        epochs=3,
        learning_rate=1e-2,
        method=build_method(method, WEIGHT_METHODS[method], method),
        seed=0,
        device=GPU,
        scratch=tmp_path / "scratch",
    )
    records = json.loads((out / "layers.json").read_text())["blocks"]
    assert any(r["kept"] for r in records)
    assert sum(r["loss_after"] for r in records) < sum(r["loss_before"] for r in records)


def test_a_delta_on_a_gpu(
    tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor
) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        model = load_delta(load_model(tiny_model_folder, device=device), compressed_delta)
        with torch.no_grad():
            logits.append(model(tiny_windows.to(device)).logits.cpu())
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_a_delta_follows_a_model_that_moves(
    tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor
) -> None:
    tokens = tiny_windows[:2]
    model = load_delta(load_model(tiny_model_folder), compressed_delta)
    with torch.no_grad():
        expected = model(tokens).logits
        for device in ("cuda", "cpu", "cuda"):
            model.to(torch.device(device))
            for rows in (1, 2):
                found = model(tokens[:rows].to(device)).logits.cpu()
                torch.testing.assert_close(found, expected[:rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 40])
def test_tenants_of_a_bank_get_what_each_gets_alone(
    length: int, tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor
) -> None:
    tokens = tiny_windows[:3, :length].to(GPU)
    with DeltaBank(load_model(tiny_model_folder, device="cuda")) as bank, torch.no_grad():
        for name in ("a", "b"):
            bank.add(name, compressed_delta)
        alone = []
        for name in ("a", None, "b"):
            bank.use(name)
            alone.append(bank.model(tokens).logits)
        bank.use(["a", None, "b"])
        found = bank.model(tokens).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(found[row], expected[row], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@pytest.mark.parametrize("method", METHODS)
def test_the_second_gpu_computes_what_the_first_does(
    method: str, compressed: Make, tiny_windows: Tensor
) -> None:
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        first, second = (
            load_model(compressed(method), device=name)(tiny_windows.to(name)).logits.cpu()
            for name in ("cuda:0", "cuda:1")
        )
    torch.testing.assert_close(second, first)
