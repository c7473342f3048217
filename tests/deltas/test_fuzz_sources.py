"""Seeded random checkpoints, fine-tunes and adapters: what is accepted is what others compute.

Every case builds a base and a change of it, and goes the whole way from extracting to loading and
writing dense. What is accepted has the logits that transformers or peft compute of the same files;
what is not is one line of a class of ours.
"""

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

import llmpress
from llmpress.core.artifacts import read_json, write_json
from llmpress.core.errors import LLMPressError
from llmpress.core.failures import one_line
from llmpress.deltas.applying import load_finetuned
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta

peft = pytest.importorskip("peft")
QUICK, EACH_LANDING, ALL, AT_ONCE = 50, 200, 1000, 10
TOKENS = torch.arange(2, 42).view(2, 20)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
]
FAMILIES: dict[str, Callable[[random.Random], Any]] = {
    "llama": lambda r: LlamaConfig(
        **SIZES, attention_bias=r.random() < 0.3, tie_word_embeddings=r.random() < 0.5
    ),
    "qwen2": lambda r: Qwen2Config(**SIZES, tie_word_embeddings=r.random() < 0.5),
    "gemma3_text": lambda _: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
    "gpt_neox": lambda _: GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    ),
    "mixtral": lambda _: MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
}
CHANGES: list[Callable[[random.Random], dict[str, Any]]] = [
    lambda r: {"rope_parameters": r.choice(ROPES)},
    lambda r: {r.choice(["rms_norm_eps", "layer_norm_eps"]): r.choice([1e-2, 1e-1])},
    lambda r: {r.choice(["hidden_act", "hidden_activation"]): r.choice(["gelu", "relu", "silu"])},
    lambda _: {"sliding_window": 4},
    lambda _: {"final_logit_softcapping": 5.0},
    lambda _: {"num_experts_per_tok": 1},
    lambda _: {"use_parallel_residual": False},
    lambda r: {"eos_token_id": r.randrange(9)},
    lambda _: {"num_hidden_layers": 3},
    lambda _: {"attention_bias": True},
    lambda _: {"vocab_size": 70},
    lambda _: {"tie_word_embeddings": True},
    lambda _: {"tie_word_embeddings": False},
    lambda _: {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    lambda _: {"max_position_embeddings": 16},
    lambda _: {"model_type": "mistral"},
]
"""What a fine-tune's configuration may say otherwise; not all of it fits all models."""


def grown(tensors: dict[str, Tensor], chance: random.Random) -> None:
    rows = chance.choice([60, 66])
    for name in [n for n in tensors if tensors[n].shape[0] == SIZES["vocab_size"]]:
        old = tensors[name]
        tensors[name] = torch.cat([old, old])[:rows]


def fewer(tensors: dict[str, Tensor], chance: random.Random) -> None:
    del tensors[chance.choice(sorted(tensors))]


def transposed(tensors: dict[str, Tensor], chance: random.Random) -> None:
    name = chance.choice(sorted(n for n in tensors if tensors[n].ndim == 2))
    tensors[name] = tensors[name].t()


def another(tensors: dict[str, Tensor], chance: random.Random) -> None:
    tensors[chance.choice(["v_head.weight", "model.layers.0.self_attn.q_proj.extra"])] = torch.ones(
        2, 2
    )


def buffers(tensors: dict[str, Tensor], _: random.Random) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def block(tensors: dict[str, Tensor], _: random.Random) -> None:
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name] * 1.01


def biases(tensors: dict[str, Tensor], _: random.Random) -> None:
    for name in [n for n in tensors if "self_attn" in n and n.endswith("proj.weight")]:
        tensors[name.replace(".weight", ".bias")] = torch.ones(len(tensors[name])) / 9


def head(tensors: dict[str, Tensor], _: random.Random) -> None:
    embeddings = tensors.get("model.embed_tokens.weight")
    if embeddings is not None:
        tensors["lm_head.weight"] = embeddings.flip(0)


EDITS = [grown, fewer, transposed, another, buffers, block, biases, head]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found.float()


def store(
    model: PreTrainedModel, folder: Path, chance: random.Random, edits: list[Any], **changes: Any
) -> None:
    """Save a model with its tensors edited, in one file or several, of one dtype or mixed."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for edit in edits:
        edit(tensors, chance)
    dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    mixed = chance.random() < 0.2
    for name, tensor in tensors.items():
        own = chance.choice([torch.float32, torch.bfloat16]) if mixed else dtype
        tensors[name] = tensor.to(own).clone().contiguous()
    (folder / "model.safetensors").unlink()
    names, count = sorted(tensors), chance.choice([1, 1, 2, 3])
    chance.shuffle(names)
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    where = {name: files[number % count] for number, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if count > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    config = read_json(folder / "config.json") | changes
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def disturb(model: torch.nn.Module, size: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))


def adapter_settings(chance: random.Random) -> dict[str, Any]:
    """Settings of a LoRA adapter, of which peft may know some not to go together."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "lm_head", "embed_tokens"]
    settings: dict[str, Any] = {
        "r": chance.choice([2, 4]),
        "lora_alpha": chance.choice([2, 5]),
        "target_modules": chance.sample(targets, chance.choice([1, 2, 3])),
    }
    more: list[dict[str, Any]] = [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": chance.choice(["pissa", "olora", "gaussian", "orthogonal", False])},
        {"init_lora_weights": chance.choice(["pissa_niter_2", "lora_ga", "mica"])},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
        {"bias": chance.choice(["all", "lora_only"])},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layers_to_transform": chance.choice([0, [1], [0, 1]])},
        {"target_modules": chance.choice(["all-linear", r".*\.(q|k)_proj"])},
        {"modules_to_save": chance.sample(["lm_head", "embed_tokens", "norm"], 1)},
        {"trainable_token_indices": chance.sample(range(64), 3)},
        {"ensure_weight_tying": True},
    ]
    for one in chance.sample(more, chance.choice([0, 1, 1, 2])):
        settings |= one
    return settings


def an_adapter(base: Path, folder: Path, chance: random.Random) -> Tensor | None:
    """Write an adapter that has learnt; return its model's logits, None where peft gives up."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    grow = chance.random() < 0.2
    if grow:
        model.resize_token_embeddings(SIZES["vocab_size"] + 2, mean_resizing=False)
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **adapter_settings(chance))
        wrapped = peft.get_peft_model(model, config)
        disturb(wrapped, 0.03)
        wrapped.save_pretrained(folder)
        wanted = logits(wrapped)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError):
        return None
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    if grow and all(len(tensor) != wanted.shape[-1] for tensor in load_file(weights).values()):
        return None  # of embeddings that go by another name peft saves no added tokens
    return wanted


def a_finetune(base: PreTrainedModel, folder: Path, chance: random.Random) -> Tensor | None:
    """Write a fine-tune; return its logits, None where transformers opens no whole model."""
    changes: dict[str, Any] = {}
    for change in chance.sample(CHANGES, chance.choice([0, 1, 1, 2])):
        changes |= change(chance)
    edits = chance.sample(EDITS, chance.choice([0, 0, 1, 1]))
    if changes.get("num_hidden_layers") == 3 and chance.random() < 0.7:
        edits = [block]
    if changes.get("attention_bias") and chance.random() < 0.7:
        edits = [biases]
    disturb(base, 1e-3)
    store(base, folder, chance, edits, **changes)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        whole = not (loaded["missing_keys"] or loaded["mismatched_keys"])
        return logits(model) if whole else None
    except Exception:  # noqa: BLE001 - whatever transformers says of it
        return None


def tried(seed: int, folder: Path) -> str:
    """Run one case; say how it ended. What others do not compute has to be refused."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    family = chance.choice(sorted(FAMILIES))
    model = AutoModelForCausalLM.from_config(FAMILIES[family](chance))
    disturb(model, 0.1)
    store(model, folder / "base", chance, [])
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    is_adapter = chance.random() < 0.5
    source = folder / "source"
    if is_adapter:
        wanted = an_adapter(folder / "base", source, chance)
    else:
        wanted = a_finetune(base, source, chance)
    if is_adapter and wanted is None:
        return "peft refused"
    try:
        extract_delta(folder / "base", source, out=folder / "delta")
        compress_delta(
            folder / "delta", method="rtn", bits=8, group_size=16, out=folder / "small",
            device="cpu",
        )  # fmt: skip
        loaded = load_finetuned(folder / "base", folder / "small")
        dense = llmpress.export_dense(
            folder / "base", delta=folder / "small", out=folder / "dense", dtype="float32"
        )
    except LLMPressError as error:
        line = one_line(error)
        assert 0 < len(line) < 2000
        assert str(folder) in line, line
        assert wanted is None or not is_plain(line), line
        return "refused"
    assert wanted is not None, f"accepted {family}, which others do not open whole"
    opened = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert AutoConfig.from_pretrained(dense).vocab_size == wanted.shape[-1]
    for name, found in (("loaded", logits(loaded)), ("dense", logits(opened))):
        assert found.shape == wanted.shape, name
        off = float((found - wanted).norm() / wanted.norm())
        assert off < (0.05 if is_adapter else 0.02), f"{name} of a {family}: off by {off:.3f}"
    return "adapter accepted" if is_adapter else "fine-tune accepted"


def is_plain(line: str) -> bool:
    """Whether a refusal says that files are damaged which others open well."""
    return "damaged" in line or ("fetch" in line and "holds no tensor" in line)


def run(seeds: range, root: Path) -> dict[str, int]:
    ends: dict[str, int] = {}
    for seed in seeds:
        folder = root / str(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, about what is asked of it
            try:
                end = tried(seed, folder)
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise
        ends[end] = ends.get(end, 0) + 1
        shutil.rmtree(folder)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, QUICK, AT_ONCE))
def test_random_sources(first: int, tmp_path: Path) -> None:
    ends = run(range(first, first + AT_ONCE), tmp_path)
    assert sum(ends.values()) == AT_ONCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        first if first < EACH_LANDING else pytest.param(first, marks=pytest.mark.night)
        for first in range(QUICK, ALL, 50)
    ],
)
def test_many_random_sources(first: int, tmp_path: Path) -> None:
    ends = run(range(first, first + 50), tmp_path)
    assert ends.get("fine-tune accepted", 0) > 3
    assert ends.get("adapter accepted", 0) > 3
