"""What the loss feels of each output: block by block as in one backward pass."""

import gc
from contextlib import AbstractContextManager
from pathlib import Path
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmpress.calibration.files import load_statistics, save_calibration
from llmpress.calibration.linear_calls import Listener, linear_calls
from llmpress.calibration.sensitivity import output_sensitivity
from llmpress.calibration.settings import CalibrationSettings
from llmpress.calibration.stage import calibrate_model
from llmpress.data.corpora import CalibrationText
from llmpress.models.architectures import block_linears
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk


def walk_of(folder: Path) -> BlockWalk:
    checkpoint = Checkpoint(folder)
    return BlockWalk(skeleton(checkpoint), checkpoint, device=torch.device("cpu"))


def test_it_is_the_squared_gradient_of_one_backward_pass(
    tiny_model_folder: Path, tiny_windows: Tensor
) -> None:
    windows = tiny_windows[:2]
    found = output_sensitivity(walk_of(tiny_model_folder), windows, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    sums: dict[str, Tensor] = {}
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    outputs: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def listen(_module: object, _inputs: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return listen

    for name, linear in linears.items():
        linear.register_forward_hook(keep(name))
    for window in windows:
        logits = model(window.unsqueeze(0)).logits[0]
        reached = logits.detach().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(reached), 1, generator=generator) * reached[:, -1:]
        labels = torch.searchsorted(reached, drawn)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, output in outputs.items():
            sums[name] = sums.get(name, 0) + output.grad[0].square().sum(dim=0)
    assert set(found) == set(linears)
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / windows.numel(), rtol=2e-3, atol=1e-9)


def test_what_a_block_computes_goes_with_it(
    tiny_model_folder: Path, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that their own hooks hold stay, block after block."""
    outputs: list[ref[Tensor]] = []

    def watched(block: nn.Module, listener: Listener) -> AbstractContextManager[None]:
        return linear_calls(block, lambda call: (outputs.append(ref(call.y)), listener(call))[1])

    monkeypatch.setattr("llmpress.calibration.sensitivity.linear_calls", watched)
    output_sensitivity(walk_of(tiny_model_folder), tiny_windows[:2])
    gc.collect()
    assert outputs
    assert not any(output() is not None for output in outputs)


def test_calibration_stores_it_and_statistics_hold_it(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(
        walk_of(tiny_model_folder),
        tiny_windows,
        tiny_windows[:1].clone(),
        tmp_path,
        tiny_windows[:2],
    )
    stored = load_file(tmp_path / "sensitivity.safetensors")
    statistics = load_statistics(tmp_path)
    assert set(stored) == set(statistics)
    for name, known in statistics.items():
        assert known.output_sensitivity is not None
        torch.testing.assert_close(known.output_sensitivity, stored[name])
        assert bool((known.output_sensitivity >= 0).all())
        assert float(known.output_sensitivity.max()) > 0


def test_the_seed_draws_the_labels(tiny_model_folder: Path, tmp_path: Path) -> None:
    texts = {"code": CalibrationText(["def f(x): return x + 1\n" * 40], ["class A: pass\n" * 40])}

    def felt(seed: int, out: Path) -> dict[str, Tensor]:
        device = torch.device("cpu")
        calibrate_model(
            tiny_model_folder, text=texts, out=out, windows=1, length=32, seed=seed, device=device
        )
        return load_file(out / "sensitivity.safetensors")

    first = felt(1, tmp_path / "first")
    torch.testing.assert_close(felt(1, tmp_path / "same"), first, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(felt(2, tmp_path / "other"), first)


def test_a_calibration_can_do_without(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(walk_of(tiny_model_folder), tiny_windows, tiny_windows[:1].clone(), tmp_path)
    assert not (tmp_path / "sensitivity.safetensors").exists()
    assert all(s.output_sensitivity is None for s in load_statistics(tmp_path).values())
    with pytest.raises(ValueError, match="sensitivity_windows"):
        CalibrationSettings(("a",), 1, 8, sensitivity_windows=-1)
