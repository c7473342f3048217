"""Every kind of compressed model, through transformers' own front door."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_artifacts import WEIGHT_METHODS, Make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmpress
from llmpress.core.artifacts import read_json
from llmpress.models import quantizer
from llmpress.nn.layers import AdaptedLinear, CompressedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compressed_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
        for key, tensor in module.tensors().items()
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=0, msg=key)


@pytest.mark.slow
def test_importing_llmpress_is_all_it_takes(compressed: Make) -> None:
    """In a fresh process, and before anything heavy is imported."""
    script = (
        "import sys, llmpress\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(compressed('rtn'))!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
        "import inspect, transformers.quantizers.auto as registry\n"
        "assert inspect.getsource(registry)\n"
        "finders = [type(finder).__module__ for finder in sys.meta_path]\n"
        "assert 'llmpress.core.registration' not in finders\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "QuantizedLinear\n"


def test_every_public_name_is_there() -> None:
    for name in llmpress.__all__:
        assert getattr(llmpress, name).__name__ == name
        assert name in dir(llmpress)
    with pytest.raises(AttributeError, match="'load_modle'"):
        llmpress.load_modle  # noqa: B018


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_saved_and_loaded_again_it_is_bit_identical(
    name: str, compressed: Make, tmp_path: Path, tiny_windows: Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(name), dtype="auto")
    assert compressed_tensors(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    config = read_json(tmp_path / "config.json")["quantization_config"]
    assert config == read_json(compressed(name) / "config.json")["quantization_config"]
    first, second = (
        m.generate(tiny_windows[:1, :8], max_new_tokens=4, do_sample=False) for m in (model, again)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_the_dtype_is_that_of_what_is_not_compressed(
    name: str, compressed: Make, tiny_windows: Tensor
) -> None:
    stored = load_file(compressed(name) / "model.safetensors")
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(compressed(name), dtype=dtype)
        tensors = compressed_tensors(model)
        assert_same({key: stored[key] for key in tensors}, tensors)
        assert model.dtype == model.get_input_embeddings().weight.dtype == dtype
        with torch.inference_mode():
            logits = model(tiny_windows[:1, :16]).logits
        assert logits.dtype == dtype
        assert bool(torch.isfinite(logits).all())


def test_device_map_auto(compressed: Make, tiny_windows: Tensor) -> None:
    folder = compressed("cluscomp")
    placed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(not p.is_meta for p in placed.parameters())
    with torch.inference_mode():
        expected = plain(tiny_windows[:1]).logits
        torch.testing.assert_close(placed(tiny_windows[:1].to(placed.device)).logits, expected)


def test_no_dense_weight_ever_exists(compressed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[torch.device] = []
    insert = quantizer.insert_layers

    def watch(model: nn.Module, layers: dict) -> None:  # type: ignore[type-arg]
        replaced.extend(model.get_submodule(name).weight.device for name in layers)
        insert(model, layers)

    monkeypatch.setattr(quantizer, "insert_layers", watch)
    model = AutoModelForCausalLM.from_pretrained(compressed("rtn"), dtype=torch.float32)
    assert {device.type for device in replaced} == {"meta"}
    assert len(replaced) == 21
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def test_a_delta_with_one_call(
    tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with torch.inference_mode():
        before = base(tiny_windows[:1]).logits
        model = llmpress.load_delta(base, str(compressed_delta))
        assert any(isinstance(module, AdaptedLinear) for module in model.modules())
        assert float((model(tiny_windows[:1]).logits - before).abs().max()) > 0.01
        llmpress.remove_delta(model)
        torch.testing.assert_close(model(tiny_windows[:1]).logits, before, rtol=0, atol=0)
