"""Checkpoints whose tensors have other names or forms than the model's: what transformers opens."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, architecture_config
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    NomicBertModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.molmo2.modeling_molmo2 import Molmo2TextModel

from llmpress.models.checkpoints.conversion import model_tensors, names_in_model
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.lazy import Index, LazyTensor
from llmpress.models.experts import separate_experts

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
FAMILIES = {
    "hrm_text": {**_SIZES, "head_dim": 8, "num_key_value_heads": 4},  # gate, q, k, v in one tensor
    "olmo_hybrid": {**_SIZES, **_LINEAR_ATTENTION},  # the model has fused what is stored apart
    "minimax": {**_SIZES, **_EXPERTS, "head_dim": 8},
    "ernie4_5_moe": {
        **_SIZES,
        "moe_intermediate_size": 24,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 0,
    },
    "lfm2_moe": {
        **_SIZES,
        **_EXPERTS,
        "moe_intermediate_size": 24,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
}
CONFIGS = {
    **{name: partial(AutoConfig.for_model, name, **sizes) for name, sizes in FAMILIES.items()},
    **{name: partial(architecture_config, name) for name in ARCHITECTURES},
}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def opened(folder: Path) -> dict[str, Tensor]:
    """What transformers makes of a folder, experts apart, without what shares another's memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    separate_experts(model)
    kept = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


@pytest.fixture(params=[True, False], ids=["as published", "as the model has it"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> Path:
    model = random_model(CONFIGS[name]())
    model.save_pretrained(tmp_path / "model", save_original_format=request.param)
    return tmp_path / "model"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_what_transformers_opens(name: str, stored: Path) -> None:
    checkpoint = Checkpoint(stored)
    expected = opened(stored)
    assert checkpoint.names() == sorted(expected), name
    equal({n: checkpoint.tensor(n) for n in expected}, expected)
    assert {n: checkpoint.shape(n) for n in expected} == {
        n: tuple(tensor.shape) for n, tensor in expected.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stored", [True], indirect=True)
def test_what_is_saved_again_is_what_was_stored(name: str, stored: Path) -> None:
    checkpoint = Checkpoint(stored)
    assert checkpoint.config.model_type == CONFIGS[name]().model_type

    again = checkpoint.published()
    equal({n: t.read() for n, t in again.items()}, load_file(stored / "model.safetensors"))


class Counted:
    """Tensors of a file, and how many numbers were read of which."""

    def __init__(self, folder: Path) -> None:
        self.taken: dict[str, int] = {}
        stored = load_file(folder / "model.safetensors")
        self.tensors = {
            name: LazyTensor(tensor.shape, tensor.dtype, partial(self.read, name, tensor))
            for name, tensor in stored.items()
        }

    def read(self, name: str, tensor: Tensor, index: Index) -> Tensor:
        self.taken[name] = self.taken.get(name, 0) + tensor[index].numel()
        return tensor[index]


@pytest.mark.parametrize("kind", [Molmo2TextModel, NomicBertModel])
def test_queries_keys_and_values_of_one_tensor(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    heads = {"head_dim": 8} if kind is Molmo2TextModel else {"num_key_value_heads": None}
    model = kind(kind.config_class(**{**_SIZES, **heads}))
    model.save_pretrained(tmp_path)
    stored, loaded = Counted(tmp_path), kind.from_pretrained(tmp_path).state_dict()
    found = model_tensors(model, stored.tensors).tensors
    assert not stored.taken
    for name in (name for name in found if "k_proj.weight" in name):
        stored.taken = {}
        torch.testing.assert_close(found[name].read(), loaded[name], rtol=0, atol=0)
        ((fused, numbers),) = stored.taken.items()
        assert stored.tensors[fused].numel() > numbers == loaded[name].numel()
    equal({n: t.read() for n, t in found.items()}, {n: loaded[n] for n in found})


@pytest.mark.parametrize(
    ("name", "linear", "published"),
    [
        ("hrm_text", "H_module.layers.0.self_attn.k_proj", "H_module.layers.0.attn.gqkv_proj"),
        ("mixtral", "layers.0.mlp.experts.2.up_proj", "layers.0.block_sparse_moe.experts.2.w3"),
        ("mixtral", "layers.1.mlp.experts.3.down_proj", "layers.1.block_sparse_moe.experts.3.w2"),
    ],
)
def test_a_linear_is_read_without_the_others(
    name: str, linear: str, published: str, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    stored = Counted(tmp_path)
    found = model_tensors(model, stored.tensors).tensors[f"model.{linear}.weight"]
    found.read()
    assert stored.taken == {f"model.{published}.weight": found.numel()}


@pytest.mark.parametrize(
    ("name", "published", "in_model"),
    [
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
            "model.layers.0.mlp.experts.3.down_proj.weight",
        ),
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("phi3", "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_names_in_the_file_and_in_the_model(name: str, published: str, in_model: str) -> None:
    names = names_in_model(random_model(CONFIGS[name]()))
    assert names[published] == in_model


def test_experts_of_different_shapes_are_named(tmp_path: Path) -> None:
    model = random_model(CONFIGS["mixtral"]())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name][:-1].clone()
    stored = {n: LazyTensor(t.shape, t.dtype, t.__getitem__) for n, t in tensors.items()}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        model_tensors(model, stored)
