"""Build tiny Llamas with a real tokenizer, trained for seconds on real text."""

import itertools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
TRAIN_PACKAGES = ("json", "email", "http", "logging", "unittest")
OTHER_PACKAGES = ("xml", "importlib", "concurrent")
HELD_OUT_PACKAGES = ("asyncio",)

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
_TOKENS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_LLAMA = {**_SIZES, **_TOKENS, **_HEADS, "intermediate_size": 176}


class Family(NamedTuple):
    """A small model of an architecture.

    Attributes:
        matrices: How many of its first block are compressed.
        settings: Of its configuration.
        model_type: What transformers calls it; its name in the table by default.
    """

    matrices: int
    settings: dict[str, Any]
    model_type: str = ""


ARCHITECTURES = {
    "qwen2": Family(7, {**_LLAMA, "tie_word_embeddings": True}),  # biases
    "gemma3": Family(7, {**_LLAMA, "head_dim": 16, "sliding_window": 32}, "gemma3_text"),
    "phi3": Family(4, _LLAMA),  # q, k, v in one matrix, gate and up in one
    "gpt_neox": Family(4, {**_LLAMA, "num_key_value_heads": None}),  # both
    "mixtral": Family(4 + 3 * 4, {**_LLAMA, "intermediate_size": 96, "num_local_experts": 4}),
    "qwen3_moe": Family(
        4 + 3 * 8,
        {**_LLAMA, "head_dim": 16, "moe_intermediate_size": 64}
        | {"num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mamba": Family(4, {**_SIZES, **_TOKENS, "state_size": 8, "time_step_rank": 16}),
    "mamba2": Family(
        2,
        {**_SIZES, **_TOKENS, "state_size": 16, "num_heads": 8, "head_dim": 16}
        | {"n_groups": 1, "chunk_size": 32},
    ),
}
"""Other architectures than Llama, as small; each is there for what its comment or name says."""
QUICK_ARCHITECTURES = ("phi3", "mixtral", "qwen3_moe")


def library_text(packages: tuple[str, ...]) -> list[str]:
    """The sources of standard library packages, one document per file, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = itertools.chain.from_iterable(sorted((root / name).glob("*.py")) for name in packages)
    return [file.read_text(encoding="utf-8") for file in files]


def tokenize(tokenizer: Tokenizer | PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All tokens of the documents, joined by a blank line: int64 ``[tokens]``."""
    encoded = tokenizer.encode("\n\n".join(documents))
    return torch.tensor(encoded.ids if isinstance(tokenizer, Tokenizer) else encoded)


def train(
    model: PreTrainedModel, tokens: Tensor, steps: int, learning_rate: float, length: int = 64
) -> None:
    """Next-token training on random stretches of tokens, batch 8; deterministic."""
    generator = torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        starts = torch.randint(len(tokens) - length, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + length] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(requires_grad=True).eval()


def build_tiny_model(folder: Path) -> None:
    """Train the tokenizer and the model and save both as a Hugging Face folder in fp32."""
    documents = library_text(TRAIN_PACKAGES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    train(model, tokenize(tokenizer, documents), steps=200, learning_rate=4e-3)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(folder)


def build_tiny_finetuned(base: Path, folder: Path) -> None:
    """The tiny model some steps further on other text; embeddings (and so the head) stay."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(requires_grad=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    train(model, tokenize(tokenizer, library_text(OTHER_PACKAGES)), steps=30, learning_rate=5e-4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def architecture_config(name: str) -> PretrainedConfig:
    """The configuration of a small model of another architecture."""
    family = ARCHITECTURES[name]
    config: PretrainedConfig = AutoConfig.for_model(family.model_type or name, **family.settings)
    return config


def build_architecture(name: str, tokenizer_folder: Path, folder: Path) -> None:
    """A small model of another architecture, trained on the same text with the same tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = tokenize(tokenizer, library_text(TRAIN_PACKAGES))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture_config(name))
    # Mamba's scan goes token by token without a GPU
    train(model, tokens, steps=100, learning_rate=4e-3, length=24 if name == "mamba" else 64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def built_once(root: Path, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that one worker of a test session builds and the others wait for."""
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            build(folder)
            done.touch()
    return folder
