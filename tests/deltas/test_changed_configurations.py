"""Fine-tunes that compute otherwise than their base: what a delta carries, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, architecture_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmpress
from llmpress.calibration.stage import calibrate_model
from llmpress.core.artifacts import read_json, write_json
from llmpress.core.errors import ArtifactError
from llmpress.deltas.applying import load_delta, load_finetuned, remove_delta
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import AdaptedLinear

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 99).view(2, 48)
ROPE = {"rope_type": "default", "rope_theta": 1e4}

Edit = Callable[[dict[str, Tensor]], None]

CHANGES = {  # what a fine-tune may change of each architecture, and a delta has to carry
    "llama": [
        {"rope_parameters": {**ROPE, "rope_theta": 1e2}},
        {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
        {
            "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 16,
        },
        {"rms_norm_eps": 1e-1},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    ],
    "gemma3": [
        {"query_pre_attn_scalar": 4},
        {"final_logit_softcapping": 0.1},
        {"sliding_window": 4},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
    "phi3": [{"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}],
    "gpt_neox": [{"use_parallel_residual": False}, {"layer_norm_eps": 1e-1}],
    "mixtral": [{"num_experts_per_tok": 1}],
    "qwen3_moe": [{"num_experts_per_tok": 1}, {"norm_topk_prob": True}],
    "mamba": [{"hidden_act": "relu"}, {"layer_norm_epsilon": 1e-1}],
    "mamba2": [{"time_step_limit": [0.0, 0.01]}, {"layer_norm_epsilon": 1e-1}],
}
CASES = [(name, change) for name, changes in CHANGES.items() for change in changes]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def written(name: str, folder: Path, **changes: Any) -> Path:
    """A model of random weights, the same for every configuration that has their shapes."""
    if name == "llama":
        from transformers import LlamaConfig

        settings = {**ARCHITECTURES["qwen2"].settings, "rope_parameters": ROPE}
        config: Any = LlamaConfig(**settings)
    else:
        config = architecture_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if changes:
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=noise))
    model.save_pretrained(folder)
    if changes:
        write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    return folder


def small_delta(base: Path, finetuned: Path, root: Path) -> Path:
    delta = extract_delta(base, finetuned, out=root / "delta")
    return compress_delta(
        delta, method="rtn", bits=8, group_size=16, out=root / "small", device=CPU
    )


def assert_near(found: Tensor, wanted: Tensor, other: Tensor) -> None:
    """Far nearer to what is wanted than what it must not be."""
    assert found.shape == wanted.shape
    distance = (found - wanted).norm()
    assert distance < 1e-3 * wanted.norm()
    assert distance < 0.2 * (wanted - other).norm()


@pytest.mark.parametrize(("name", "change"), CASES, ids=[f"{n}-{'-'.join(c)}" for n, c in CASES])
def test_a_changed_configuration_comes_along(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    base = written(name, tmp_path / "base")
    tuned = written(name, tmp_path / "tuned", **change)
    plain = written(
        name, tmp_path / "plain", tie_word_embeddings=opened(base).config.tie_word_embeddings
    )
    wanted, unchanged = logits(opened(tuned)), logits(opened(plain))
    small = small_delta(base, tuned, tmp_path)
    header = read_json(small / "delta.json")
    assert header["config"].keys() >= change.keys() - {"head_dim"}
    assert header["format_version"] == 3
    model = opened(base)
    before = logits(model)
    load_delta(model, small)
    assert_near(logits(model), wanted, unchanged)
    remove_delta(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    dense = llmpress.export_dense(base, delta=small, out=tmp_path / "dense", dtype="float32")
    assert_near(logits(opened(dense)), wanted, unchanged)
    assert "format_version" not in read_json(dense / "config.json")
    walked = FinetunedCheckpoint(dense_checkpoint(base), DeltaFolder(tmp_path / "delta", "delta"))
    states = []
    for checkpoint in (Checkpoint(tuned), walked):
        walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU)
        hidden = walk.embed(TOKENS)
        for index in range(len(walk)):
            hidden = walk.propagate(walk.load(index), index, hidden)
        states.append(hidden)
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-3)


def edited(source: Path, out: Path, edit: Edit, **changes: Any) -> Path:
    """A copy of a model with other tensors and settings."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(own, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", read_json(source / "config.json") | changes)
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def another_block(tensors: dict[str, Tensor]) -> None:
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    for name, tensor in last.items():
        tensors[name.replace(".2.", ".3.")] = tensor * 1.1
        tensors[name] = tensor * 0.9


def biases(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".self_attn." in name]:
        rows = len(tensors[name])
        tensors[name.replace(".weight", ".bias")] = torch.linspace(-0.2, 0.2, rows)


def mlp_biases(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name.replace(".weight", ".bias")] = torch.linspace(-0.2, 0.2, len(tensors[name]))


def fewer_tokens(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:500] * 1.01


def more_tokens(tensors: dict[str, Tensor]) -> None:
    old = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([old, old[:4] * 1.01])


def a_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)


def nothing(tensors: dict[str, Tensor]) -> None:
    del tensors


ADDED = [
    (another_block, {"num_hidden_layers": 4}),
    (biases, {"attention_bias": True}),
    (mlp_biases, {"mlp_bias": True, "rms_norm_eps": 1e-1}),
    (fewer_tokens, {"vocab_size": 500, "rms_norm_eps": 1e-1}),
    (more_tokens, {"vocab_size": 516, "rms_norm_eps": 1e-1}),
    (a_head, {"tie_word_embeddings": False, "rms_norm_eps": 1e-1}),
    (a_head, {}),  # tied by its configuration alone, which transformers does not follow
]


@pytest.mark.parametrize(("edit", "changes"), ADDED, ids=[edit.__name__ for edit, _ in ADDED])
def test_added_tensors_come_along(
    edit: Edit,
    changes: dict[str, Any],
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tmp_path: Path,
) -> None:
    tuned = edited(tiny_finetuned_folder, tmp_path / "tuned", edit, **changes)
    small = small_delta(tiny_model_folder, tuned, tmp_path)
    wanted, model = logits(opened(tuned)), opened(tiny_model_folder)
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    assert_like(logits(load_delta(model, small)), wanted)
    remove_delta(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert [name for name, _ in model.named_parameters()] == names
    dense = llmpress.export_dense(tiny_model_folder, delta=small, out=tmp_path / "dense",
                                  dtype="float32")  # fmt: skip
    assert_like(logits(opened(dense)), wanted)
    with llmpress.DeltaBank(model) as bank:
        bank.add("tuned", small)
        bank.use("tuned")
        assert_like(logits(model), wanted)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def assert_like(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


def test_a_base_with_a_head_of_its_own_becomes_a_tied_model(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    base = edited(tiny_model_folder, tmp_path / "base", a_head, tie_word_embeddings=False)
    small = small_delta(base, tiny_finetuned_folder, tmp_path)
    wanted = logits(opened(tiny_finetuned_folder))
    assert_like(logits(load_finetuned(base, small)), wanted)
    dense = llmpress.export_dense(base, delta=small, out=tmp_path / "dense", dtype="float32")
    assert_like(logits(opened(dense)), wanted)


def test_old_buffers_are_no_part_of_a_fine_tuned_model(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    tuned = edited(tiny_finetuned_folder, tmp_path / "tuned", add)
    delta = DeltaFolder(extract_delta(tiny_model_folder, tuned, out=tmp_path / "delta"), "delta")
    assert not any("inv_freq" in name for name in delta.names())
    old = edited(tiny_model_folder, tmp_path / "old", add)
    extract_delta(old, tiny_finetuned_folder, out=tmp_path / "other")


def value_head(tensors: dict[str, Tensor]) -> None:
    tensors["v_head.summary.weight"] = torch.ones(1, 64)


def projector(tensors: dict[str, Tensor]) -> None:
    tensors["model.mm_projector.weight"] = torch.ones(64, 96)


def one_block_less(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


def no_embeddings(tensors: dict[str, Tensor]) -> None:
    del tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("edit", "changes", "named"),
    [
        (value_head, {}, "v_head.summary.weight"),
        (projector, {}, "model.mm_projector.weight"),
        (biases, {}, "self_attn.k_proj.bias"),
        (no_embeddings, {}, "model.embed_tokens.weight"),
        (one_block_less, {"num_hidden_layers": 2}, "model.layers.2"),
        (nothing, {"attention_bias": True}, "self_attn.k_proj.bias"),
        (nothing, {"num_hidden_layers": 4}, "model.layers.3"),
        (fewer_tokens, {}, "model.embed_tokens.weight"),
        (nothing, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral"),
    ],
)
def test_what_no_delta_can_carry_is_refused_by_name(
    edit: Edit,
    changes: dict[str, Any],
    named: str,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tmp_path: Path,
) -> None:
    tuned = edited(tiny_finetuned_folder, tmp_path / "tuned", edit, **changes)
    with pytest.raises(ArtifactError, match=named):
        extract_delta(tiny_model_folder, tuned, out=tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


@pytest.fixture
def changed(tiny_finetuned_folder: Path, tmp_path: Path) -> Path:
    """The fine-tuned model with another normalization."""
    return edited(tiny_finetuned_folder, tmp_path / "tuned", nothing, rms_norm_eps=1e-2)


def test_rows_have_no_configuration_of_their_own(
    tiny_model_folder: Path, changed: Path, compressed_delta: Path, tmp_path: Path
) -> None:
    small = small_delta(tiny_model_folder, changed, tmp_path)
    model = opened(tiny_model_folder)
    before = logits(model)
    with llmpress.DeltaBank(model) as bank:
        bank.add("plain", compressed_delta)
        bank.add("changed", small)
        bank.use(["plain", None])
        with pytest.raises(ArtifactError, match="rms_norm_eps"):
            bank.use(["changed", None])
        bank.use("changed")
        assert_like(logits(model), logits(opened(changed)))
        assert bank.nbytes("changed") > 0
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_rows_may_differ_in_what_computes_nothing(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    tuned = edited(tiny_finetuned_folder, tmp_path / "tuned", nothing, eos_token_id=5)
    small = small_delta(tiny_model_folder, tuned, tmp_path)
    model = opened(tiny_model_folder)
    with llmpress.DeltaBank(model) as bank:
        bank.add("tuned", small)
        bank.use(["tuned", "tuned"])
        assert_like(logits(model), logits(opened(tuned)))
    assert load_finetuned(tiny_model_folder, small).config.eos_token_id == 5


def test_calibrating_and_sequential_compressing_follow_the_configuration(
    tiny_model_folder: Path, changed: Path, tmp_path: Path
) -> None:
    delta = extract_delta(tiny_model_folder, changed, out=tmp_path / "delta")
    how = {"text": ["def f(x):\n    return x\n" * 200], "windows": 2, "length": 32}
    settings: dict[str, Any] = {**how, "device": CPU, "autocast": False}
    calibrate_model(tiny_model_folder, delta=delta, out=tmp_path / "on-delta", **settings)
    calibrate_model(changed, out=tmp_path / "on-tuned", **settings)
    for file in (tmp_path / "on-tuned").glob("moments-*.safetensors"):
        wanted, found = load_file(file), load_file(tmp_path / "on-delta" / file.name)
        for name, moment in wanted.items():
            torch.testing.assert_close(found[name], moment, rtol=1e-3, atol=1e-4)
    small = compress_delta(delta, method="rtn", bits=8, group_size=16, base=tiny_model_folder,
                           sequential=True, out=tmp_path / "small", device=CPU, **how)  # fmt: skip
    assert_like(logits(load_finetuned(tiny_model_folder, small)), logits(opened(changed)))


def test_distilling_keeps_the_configuration(
    tiny_model_folder: Path, changed: Path, tmp_path: Path
) -> None:
    delta = extract_delta(tiny_model_folder, changed, out=tmp_path / "delta")
    small = compress_delta(delta, method="svd", rank=8, out=tmp_path / "small", device=CPU)
    trained = llmpress.train_model(
        small,
        trains="delta",
        original=changed,
        base=tiny_model_folder,
        text=["def f(x):\n    return x\n" * 200],
        out=tmp_path / "trained",
        steps=2,
        learning_rate=1e-4,
        objective="distillation",
        windows=4,
        held_out=1,
        length=32,
        batch_size=2,
        device=CPU,
    )
    assert read_json(trained / "delta.json")["config"] == {"rms_norm_eps": 1e-2}
    assert load_finetuned(tiny_model_folder, trained).model.norm.variance_epsilon == 1e-2


def test_no_adapter_holds_a_configuration(
    tiny_model_folder: Path, changed: Path, tmp_path: Path
) -> None:
    delta = extract_delta(tiny_model_folder, changed, out=tmp_path / "delta")
    small = compress_delta(delta, method="svd", rank=8, out=tmp_path / "small", device=CPU)
    with pytest.raises(ArtifactError, match="rms_norm_eps"):
        llmpress.export_adapter(small, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("method", ["rtn", "cluscomp"])
def test_a_compressed_base_takes_the_configuration_too(
    method: str, compressed: Callable[[str], Path], changed: Path, tmp_path: Path
) -> None:
    base = compressed(method)
    small = small_delta(base, changed, tmp_path)
    model = llmpress.load_model(base)
    before = logits(model)
    load_delta(model, small, base_folder=base)
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 21
    dense = llmpress.export_dense(base, delta=small, out=tmp_path / "dense", dtype="float32")
    wanted = logits(opened(changed))
    for found in (logits(model), logits(opened(dense))):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
    remove_delta(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_an_unchanged_configuration_leaves_the_format_as_it_was(tiny_delta: Path) -> None:
    header = read_json(tiny_delta / "delta.json")
    assert header["format_version"] == 2
    assert "config" not in header
