"""The layout of a model: shapes and dtypes of its tensors, nothing of their values."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmpress.core.artifacts import WEIGHTS_INDEX
from llmpress.core.errors import ArtifactError
from llmpress.methods.base import Shape
from llmpress.models.architectures import block_linears, decoder_blocks
from llmpress.models.checkpoints.files import WEIGHTS, Checkpoint, companions
from llmpress.models.experts import SeparateExperts, separate_experts

TRACE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """Everything that an estimate needs to know of a model; equal only to itself.

    Attributes:
        prefix: Name of the list of decoder blocks, such as ``model.layers``.
        blocks: Compressible linears of each block by full name, from the bottom up.
        leaders: For each linear, the first linear of its block with the same input.
        tensors: Every stored tensor by name, on the meta device; tied ones once.
        hidden: Width of the hidden states.
        vocabulary: Rows of the output embedding.
        config: The configuration as config.json holds it.
        companion_bytes: Of each file that a compressed folder takes over: tokenizer, chat template;
            none where only the configuration is known.
    """

    prefix: str
    blocks: tuple[Mapping[str, Shape], ...]
    leaders: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    hidden: int
    vocabulary: int
    config: Mapping[str, Any]
    companion_bytes: tuple[int, ...] = ()

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """All compressible linears by full name."""
        return {name: shape for block in self.blocks for name, shape in block.items()}

    @cached_property
    def inputs(self) -> list[dict[str, int]]:
        """Widths of each block's distinct inputs by leader: a second moment is stored of each."""
        leading = [{self.leaders[name] for name in block} for block in self.blocks]
        return [
            {name: shape.in_features for name, shape in block.items() if name in first}
            for block, first in zip(self.blocks, leading, strict=True)
        ]

    @cached_property
    def num_weights(self) -> int:
        """Number of stored entries, as ``compress`` counts the weights of the model."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def linear_weights(self) -> int:
        """Number of weights that methods compress."""
        return sum(math.prod(shape) for shape in self.linears.values())

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def block_weights(self) -> int:
        """Weights of the linears of the largest block."""
        return max(sum(math.prod(shape) for shape in block.values()) for block in self.blocks)

    @cached_property
    def block_features(self) -> int:
        """Inputs plus outputs of all linears of the largest block: its activations per token."""
        return max(sum(sum(shape) for shape in block.values()) for block in self.blocks)

    def stored_as(self, dtype: torch.dtype) -> "ModelShapes":
        """Return the same layout with every tensor stored in ``dtype``."""
        return replace(self, tensors={name: t.to(dtype) for name, t in self.tensors.items()})


def read_shapes(source: Path) -> ModelShapes:
    """Read the layout of a model; config.json alone is enough.

    Without weights the stored dtype is the configuration's, and tied tensors are stored once.

    Args:
        source: A Hugging Face folder, with or without weights, or a config.json.

    Raises:
        ArtifactError: No configuration there, or one of an unknown or unusual architecture.
    """
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise ArtifactError(f"{source}: no model here (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        prefix, _ = decoder_blocks(model)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{file}: no model that transformers builds ({reason})") from None
    separate_experts(model)
    model.eval()
    stored = any((file.parent / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    stored = stored and file.name == "config.json"
    blocks = tuple(
        {name: Shape(m.out_features, m.in_features) for name, m in linears.items()}
        for linears in block_linears(model)
    )
    if not any(blocks):
        raise ArtifactError(f"{file}: no linear layer in any decoder block to compress")
    text_config = config.get_text_config()
    return ModelShapes(
        prefix=prefix,
        blocks=blocks,
        leaders=_leaders(model),
        tensors=_stored_tensors(file.parent) if stored else _expected_tensors(model, config),
        hidden=int(text_config.hidden_size),
        vocabulary=int(text_config.vocab_size),
        config=config.to_diff_dict(),
        companion_bytes=tuple(p.stat().st_size for p in companions(file.parent) if stored),
    )


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)  # its tensors are mapped, not read
    return {n: torch.empty_like(checkpoint.tensor(n), device="meta") for n in checkpoint.names()}


def _expected_tensors(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, Tensor]:
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in sorted(model.state_dict().items())
        if name not in tied
    }


def _leaders(model: PreTrainedModel) -> dict[str, str]:
    """Return, for each linear of the blocks, the first one of its block with the same input.

    Found by a forward pass on the meta device; where an architecture cannot run there, linears that
    it did not reach count as having inputs of their own.
    """
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: inputs.update({name: arguments[0]})

    blocks = block_linears(model)
    for name, linear in (item for linears in blocks for item in linears.items()):
        linear.register_forward_pre_hook(note(name))
    for module in model.modules():
        if isinstance(module, SeparateExperts):  # which tokens an expert gets is not known here
            module.forward = partial(_all_experts, module)  # type: ignore[method-assign]
    shape = (1, TRACE_TOKENS)
    with (
        torch.no_grad(),
        suppress(RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    ):
        model.get_decoder()(
            input_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
            position_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
            attention_mask=torch.zeros(1, 1, TRACE_TOKENS, TRACE_TOKENS, device="meta"),
            use_cache=False,
        )
    return {
        name: next(n for n in linears if n == name or inputs.get(n, n) is inputs.get(name))
        for linears in blocks
        for name in linears
    }


def _all_experts(experts: SeparateExperts, hidden_states: Tensor, *_: Tensor) -> Tensor:
    for expert in experts:
        expert(hidden_states.clone())  # each has an input of its own
    return hidden_states
