"""Tenants of the tiny model that change more than its linear layers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.registry import build_method

Edit = Callable[[PreTrainedModel], object]
Deltas = dict[str, Path]


def grow(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(515, mean_resizing=False)


def untie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.9)


def add_biases(model: PreTrainedModel) -> None:
    model.config.attention_bias = True
    for name, module in model.named_modules():
        if "self_attn." in name and isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.randn(module.out_features))


def tenant(base: Path, out: Path, edit: Edit | None = None, source: Path | None = None) -> Path:
    """The compressed delta of a model whose tensors all differ a little from its base's."""
    model = AutoModelForCausalLM.from_pretrained(source or base, dtype=torch.float32)
    torch.manual_seed(len(out.name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean())
    if edit is not None:
        edit(model)
    model.save_pretrained(out / "finetuned")
    extract_delta(base, out / "finetuned", out=out / "delta")
    compress_delta(
        out / "delta",
        method=build_method("svd", {"rank": 8}, "svd"),
        seed=0,
        device=torch.device("cpu"),
        scratch=out / "scratch",
        out=out / "small",
    )
    return out / "small"
