"""Dense exports compute what the packed model computes, and know nothing of llmpress."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_artifacts import WEIGHT_METHODS, Make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmpress
from llmpress.core.artifacts import read_json, sha256
from llmpress.core.errors import ArtifactError
from llmpress.nn.layers import CompressedLinear


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_a_dense_export_computes_the_same(
    name: str, compressed: Make, tmp_path: Path, tiny_windows: Tensor
) -> None:
    packed = llmpress.load_model(compressed(name))
    llmpress.export_dense(compressed(name), out=tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert "quantization_config" not in read_json(tmp_path / "dense/config.json")
    assert not any(isinstance(module, CompressedLinear) for module in dense.modules())
    assert dense.dtype == torch.float32
    with torch.inference_mode():
        expected = llmpress.dequantized(packed)(tiny_windows[:2]).logits
        torch.testing.assert_close(dense(tiny_windows[:2]).logits, expected, rtol=0, atol=0)
    AutoTokenizer.from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_once(dtype: torch.dtype, compressed: Make, tmp_path: Path) -> None:
    llmpress.export_dense(compressed("cluscomp"), out=tmp_path / "dense", dtype=dtype)
    stored = load_file(tmp_path / "dense/model.safetensors")
    packed = llmpress.load_model(compressed("cluscomp"))
    for name, module in packed.named_modules():
        if isinstance(module, CompressedLinear):
            weight = module.dequantize().to(dtype)
            torch.testing.assert_close(stored[f"{name}.weight"], weight, rtol=0, atol=0)
            del stored[f"{name}.weight"]
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}  # as in the original
    assert read_json(tmp_path / "dense/config.json")["dtype"] == str(dtype).removeprefix("torch.")


def test_base_and_delta_become_one_model(
    tiny_model_folder: Path, compressed_delta: Path, tmp_path: Path, tiny_windows: Tensor
) -> None:
    for out in ("one", "two"):
        llmpress.export_dense(
            tiny_model_folder, out=tmp_path / out, delta=compressed_delta, dtype=torch.float32
        )
    digests = [sha256(tmp_path / out / "model.safetensors") for out in ("one", "two")]
    assert digests[0] == digests[1]
    adapted = llmpress.load_delta(llmpress.load_model(tiny_model_folder), compressed_delta)
    with torch.inference_mode():
        expected = llmpress.dequantized(adapted)(tiny_windows[:2]).logits
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
        torch.testing.assert_close(dense(tiny_windows[:2]).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_delta_of_another_base_is_refused(
    tiny_finetuned_folder: Path, compressed_delta: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="tiny"):
        llmpress.export_dense(tiny_finetuned_folder, out=tmp_path / "out", delta=compressed_delta)
    assert not list(tmp_path.iterdir())


def test_biases_of_packed_layers_come_along(tmp_path: Path, tiny_windows: Tensor) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from llmpress.compression.stage import compress_model
    from llmpress.methods.registry import build_method

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    compress_model(
        tmp_path / "model",
        method=build_method("rtn", {"num_bits": 8, "group_size": 16}, "rtn"),
        seed=0,
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        out=tmp_path / "packed",
    )
    llmpress.export_dense(tmp_path / "packed", out=tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    packed = llmpress.load_model(tmp_path / "packed")
    with torch.inference_mode():
        expected = llmpress.dequantized(packed)(tiny_windows[:1]).logits
        torch.testing.assert_close(dense(tiny_windows[:1]).logits, expected, rtol=0, atol=0)
        original = model(tiny_windows[:1]).logits
    assert float((expected - original).abs().max()) < 0.1 * float(original.abs().max())
