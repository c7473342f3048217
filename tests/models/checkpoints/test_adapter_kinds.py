"""Every kind of adapter that peft writes: computed as peft does, or refused by its name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmpress.core.artifacts import write_json
from llmpress.core.errors import ArtifactError, LLMPressError, SourceError
from llmpress.deltas.extraction import extract_delta
from llmpress.evaluation.subjects import folder_subject
from llmpress.models.checkpoints.adapter_settings import KNOWN
from llmpress.models.checkpoints.adapter_view import AdapterCheckpoint
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
]
VOCABULARY = 96
TOKENS = torch.arange(96).view(2, 48)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, whose head shares the embeddings or not."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=request.param,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    disturb(model, 0.1)
    folder: Path = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def disturb(model: torch.nn.Module, size: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def trained(base: Path, folder: Path, *, more_tokens: int = 0, **settings: Any) -> Tensor:
    """Write an adapter as if it had been trained; return the logits of the model it was."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if more_tokens:
        model.resize_token_embeddings(VOCABULARY + more_tokens, mean_resizing=False)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **chosen | settings)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    disturb(wrapped, 0.05)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


def model_of(view: Checkpoint) -> PreTrainedModel:
    """The model that a checkpoint's configuration and tensors are."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(view.config, dtype=torch.float32)
    tensors = {name: view.tensor(name) for name in view.names()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if view.config.tie_word_embeddings else set())
    model.tie_weights()
    return model


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "zeros": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa of own ranks": {"init_lora_weights": "pissa", "rank_pattern": {"v_proj": 2}},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "pissa and dora": {"init_lora_weights": "pissa", "use_dora": True},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "alpha_pattern": {"v_proj": 3}},
    "patterns": {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "some blocks": {"layers_to_transform": [1]},
    "one block": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "transposed": {"fan_in_fan_out": True},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "embeddings whole and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head whole": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings and tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [7, 3, 90]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [7, 3]}},
    "more tokens": {"more_tokens": 3},
    "more tokens whole": {"more_tokens": 3, "modules_to_save": ["embed_tokens", "lm_head"]},
    "more tokens, embeddings whole": {"more_tokens": 3, "modules_to_save": ["embed_tokens"]},
    "more tokens, some trained": {"more_tokens": 3, "trainable_token_indices": [96, 97, 98]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_model_that_was_trained(kind: str, base: Path, tmp_path: Path) -> None:
    wanted = trained(base, tmp_path / "adapter", **KINDS[kind])
    view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(model_of(view)), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted[..., :VOCABULARY] - logits(model_of(Checkpoint(base)))).abs().max() > 0.05
    delta = DeltaFolder(extract_delta(base, tmp_path / "adapter", out=tmp_path / "delta"), "delta")
    rebuilt = FinetunedCheckpoint(Checkpoint(base), delta)
    torch.testing.assert_close(logits(model_of(rebuilt)), wanted, rtol=1e-4, atol=1e-4)


OF_THE_HEAD = {"trainable_token_indices": {"lm_head": [7], "embed_tokens": [3]}}
FROM_THE_HEAD = {"init_lora_weights": "olora", "target_modules": ["q_proj", "lm_head"]}
LOST_HEAD = {"more_tokens": 3, "target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [(OF_THE_HEAD, "tied"), (FROM_THE_HEAD, "tied"), (LOST_HEAD, "untied")],
    ids=["tokens", "olora", "lost"],
)
def test_where_head_and_embeddings_are_one_adapters_mean_something_else(
    settings: dict[str, Any], refused: str, base: Path, tmp_path: Path
) -> None:
    """Tokens of a head that is the embeddings; a grown head of its own that peft does not save."""
    wanted = trained(base, tmp_path / "adapter", **settings)
    tied = Checkpoint(base).config.tie_word_embeddings
    if tied == (refused == "tied"):
        with pytest.raises(LLMPressError, match=str(tmp_path / "adapter")):
            AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    else:
        view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
        torch.testing.assert_close(logits(model_of(view)), wanted, rtol=1e-4, atol=1e-4)


NAMES = {
    "of the adapter": lambda n: n.replace(".lora_A.", ".lora_A.default.").replace(
        ".lora_B.", ".lora_B.default."
    ),
    "of torch.compile": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "without a prefix": lambda n: n.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", NAMES)
def test_names_of_other_trainers_are_understood(names: str, base: Path, tmp_path: Path) -> None:
    wanted = trained(base, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    renamed = {NAMES[names](name): tensor for name, tensor in load_file(weights).items()}
    assert renamed.keys() != load_file(weights).keys()
    save_file(renamed, weights)
    view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(model_of(view)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision_is_computed_in_fp32(
    dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(half)
    wanted = trained(half, tmp_path / "adapter", init_lora_weights="pissa", use_dora=True)
    view = AdapterCheckpoint(Checkpoint(half), tmp_path / "adapter")
    assert view.tensor("model.layers.0.self_attn.q_proj.weight").dtype == torch.float32
    torch.testing.assert_close(logits(model_of(view)), wanted, rtol=1e-3, atol=1e-3)


def written(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", plain | settings)
    names = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"
    }
    save_file({name: torch.zeros(4, 4) for name in names}, folder / "adapter_model.safetensors")
    return folder


def refuse(base: Path, folder: Path, named: str) -> None:
    with pytest.raises(SourceError, match=named) as caught:
        extract_delta(base, folder, out=folder.with_name("delta"))
    assert str(folder) in str(caught.value)
    assert not folder.with_name("delta").exists()


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType) - {"LORA"}))
def test_other_kinds_of_peft_are_refused(kind: str, base: Path, tmp_path: Path) -> None:
    refuse(base, written(tmp_path / "adapter", peft_type=str(kind.value)), kind.value)


@pytest.mark.parametrize(
    "start", ["pissa_niter_4", "corda", "CorDA", "loftq", "lora_ga", "another", "", ["pissa"], 3]
)
def test_adapters_that_took_from_the_base_untold_are_refused(
    start: Any, base: Path, tmp_path: Path
) -> None:
    refuse(base, written(tmp_path / "adapter", init_lora_weights=start), "init_lora_weights")


def test_embeddings_that_start_unusually_are_refused(base: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "embed_tokens"]
    trained(base, tmp_path / "adapter", init_lora_weights="mica", target_modules=targets)
    with pytest.raises(ArtifactError, match="embed_tokens"):
        AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")


SETTINGS = {field.name for field in dataclasses.fields(peft.LoraConfig)} - KNOWN


@pytest.mark.parametrize("setting", sorted(SETTINGS - {"runtime_config"}))
def test_settings_that_compute_something_else_are_refused(
    setting: str, base: Path, tmp_path: Path
) -> None:
    refuse(base, written(tmp_path / "adapter", **{setting: [1]}), setting)


@pytest.mark.parametrize(
    "kind", ["dora", "embeddings", "pissa and dora", "norms", "tokens", "mica"]
)
def test_an_adapter_is_evaluated_as_the_model_that_was_trained(
    kind: str, base: Path, tmp_path: Path
) -> None:
    wanted = trained(base, tmp_path / "adapter", **KINDS[kind])
    subject = folder_subject(tmp_path / "adapter", original=base)
    for load in (subject.load, subject.load_dense):
        torch.testing.assert_close(logits(load(torch.float32, "cpu")), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_cannot_be_evaluated_is_refused(base: Path, tmp_path: Path) -> None:
    untold = written(tmp_path / "untold", init_lora_weights="lora_ga")
    with pytest.raises(SourceError, match="init_lora_weights"):
        folder_subject(untold, original=base).load(torch.float32, "cpu")
    trained(base, tmp_path / "adapter", more_tokens=3)
    with pytest.raises(ArtifactError, match=str(tmp_path / "adapter")):
        folder_subject(tmp_path / "adapter", original=base).load(torch.float32, "cpu")
