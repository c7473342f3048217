"""Tensors that only the fine-tuned model has, in the precision that transformers loads them in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import llmpress
from llmpress.core.artifacts import read_json, write_json
from llmpress.deltas.applying import load_delta, load_finetuned
from llmpress.deltas.extraction import extract_delta

CASES = [
    ("strictly", torch.bfloat16),
    ("strictly", torch.float16),
    ("fp16 alone", torch.bfloat16),
    ("fp16 alone", torch.float16),
    ("glm4_moe", torch.bfloat16),
]


def one_block_more(base: Path, out: Path, last: int) -> Path:
    """A fine-tune whose last block is there twice, every tensor a little larger."""
    out.mkdir()
    tensors = {name: 1.01 * t for name, t in load_file(base / "model.safetensors").items()}
    for name in [name for name in tensors if f".layers.{last}." in name]:
        tensors[name.replace(f".{last}.", f".{last + 1}.", 1)] = tensors[name] * 1.1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = read_json(base / "config.json")
    for key in ("layer_types", "mlp_layer_types"):
        if key in config:
            config[key] = [*config[key], config[key][-1]]
    write_json(out / "config.json", config | {"num_hidden_layers": last + 2})
    return out


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A base, and a fine-tune of it with tensors that transformers keeps in fp32."""
    if request.param == "glm4_moe":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                 "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
                 "first_k_dense_replace": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
        AutoModelForCausalLM.from_config(Glm4MoeConfig(**sizes)).save_pretrained(tmp_path / "base")
        base, last = tmp_path / "base", 1
    else:
        name = {"fp16 alone": "_keep_in_fp32_modules", "strictly": "_keep_in_fp32_modules_strict"}
        kept = ["post_*_layernorm", "norm.weight"]
        monkeypatch.setattr(LlamaPreTrainedModel, name[request.param], kept)
        base, last = request.getfixturevalue("tiny_model_folder"), 2
    return base, one_block_more(base, tmp_path / "tuned", last)


def assert_precision(model: PreTrainedModel, wanted: PreTrainedModel, *, where: str) -> None:
    """What both have under one name and is no layer with a delta is the same, to the bit."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    own = dict(wanted.named_parameters()) | dict(wanted.named_buffers())
    small = [name for name in own if own[name].ndim == 1 and "inv_freq" not in name]
    assert small
    for name in small:
        torch.testing.assert_close(
            found[name], own[name], rtol=0, atol=0, msg=lambda m, n=name: f"{where}, {n}: {m}"
        )


@pytest.mark.parametrize(("pair", "dtype"), CASES, indirect=["pair"])
def test_added_tensors_are_loaded_as_transformers_does(
    pair: tuple[Path, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    base, tuned = pair
    delta = extract_delta(base, tuned, out=tmp_path / "delta")
    small = llmpress.compress_delta(delta, method="rtn", bits=8, group_size=16,
                                    out=tmp_path / "small", device="cpu")  # fmt: skip
    wanted = AutoModelForCausalLM.from_pretrained(tuned, dtype=dtype)
    assert_precision(load_finetuned(base, small, dtype=dtype), wanted, where="loaded")
    moved = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert_precision(load_delta(moved, small, base_folder=base), wanted, where="put on")
    dense = llmpress.export_dense(base, delta=small, out=tmp_path / "dense", dtype=dtype)
    applied = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    assert_precision(applied, wanted, where="applied")
    model = llmpress.load_model(base, dtype=dtype)
    with llmpress.DeltaBank(model) as bank:
        bank.add("tuned", small)
        bank.use("tuned")
        assert_precision(model, wanted, where="in a bank")
