"""Of a model that also sees, the language model is compressed, and the rest stays as it is."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config

import llmpress
from llmpress.nn.layers import CompressedLinear

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,  # more than the text
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LANGUAGE = "model.language_model.layers."


@pytest.fixture(scope="module")
def gemma(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "gemma3"
    tokens = {"image_token_index": 511, "boi_token_index": 510, "eoi_token_index": 509}
    config = Gemma3Config(
        text_config=TEXT, vision_config=IMAGES, mm_tokens_per_image=4, tie_word_embeddings=True,
        **tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tiny_model_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return folder


def logits(folder: Path, windows: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = llmpress.load_model(folder)(windows).logits
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_text_is_compressed_and_nothing_else(
    method: str, gemma: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    text = {"text": ["x = 1\n" * 900] * 5, "windows": 2, "length": 32} if method == "gptq" else {}
    packed = llmpress.compress_model(
        gemma, method=method, bits=8, group_size=16, out=tmp_path / "packed", **text
    )
    described = llmpress.describe(packed)
    names = [layer["name"] for layer in described["layers"]]
    assert len(names) == 2 * 7
    assert all(name.startswith(LANGUAGE) for name in names)
    assert any("vision_tower" in name for name in described["left_out"])
    model = AutoModelForImageTextToText.from_pretrained(packed, dtype="auto")
    found = {n for n, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert found == set(names)
    source = AutoModelForImageTextToText.from_pretrained(gemma, dtype="auto")
    for name, tensor in source.state_dict().items():
        if name.rpartition(".")[0] not in found:
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    off = logits(packed, tiny_windows[:1]) - logits(gemma, tiny_windows[:1])
    assert 0 < float(off.norm() / logits(gemma, tiny_windows[:1]).norm()) < 0.05
    assert (packed / "preprocessor_config.json").is_file()
    dense = llmpress.export_dense(packed, out=tmp_path / "dense", dtype="float32")
    stored, original = (load_file(f / "model.safetensors") for f in (dense, gemma))
    assert stored.keys() == original.keys()
    torch.testing.assert_close(logits(dense, tiny_windows[:1]), logits(packed, tiny_windows[:1]))


def test_a_delta_of_the_text(gemma: Path, tiny_windows: Tensor, tmp_path: Path) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(gemma)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.startswith(LANGUAGE):
                parameter.add_(0.01 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    delta = llmpress.extract_delta(gemma, tmp_path / "tuned", out=tmp_path / "delta")
    small = llmpress.compress_delta(delta, method="rtn", bits=8, out=tmp_path / "small")
    with torch.no_grad():
        found = llmpress.load_finetuned(gemma, small)(tiny_windows[:1]).logits
        expected = tuned.eval()(tiny_windows[:1]).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
