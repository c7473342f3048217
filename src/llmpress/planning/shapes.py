"""The layout of a model: shapes and dtypes of its tensors, nothing of their values."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmpress.calibration.linear_calls import linear_calls
from llmpress.compression.layers import model_shapes
from llmpress.core.artifacts import WEIGHTS_INDEX
from llmpress.core.errors import ArtifactError
from llmpress.methods.base import Shape
from llmpress.models.architectures import decoder_blocks
from llmpress.models.checkpoints.files import WEIGHTS, Checkpoint
from llmpress.models.experts import SeparateExperts, separate_experts

TRACE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """Everything that an estimate needs to know of a model; equal only to itself.

    Attributes:
        blocks: Compressible linears of each block by full name, from the bottom up.
        inputs: Widths of each block's distinct inputs, by the first linear that gets one: a second
            moment is stored of each.
        tensors: Every stored tensor by name, on the meta device; tied ones once.
        hidden: Width of the hidden states.
        vocabulary: Rows of the output embedding.
    """

    blocks: tuple[dict[str, Shape], ...]
    inputs: tuple[dict[str, int], ...]
    tensors: Mapping[str, Tensor]
    hidden: int
    vocabulary: int

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """All compressible linears by full name."""
        return {name: shape for block in self.blocks for name, shape in block.items()}

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
        return max(sum(map(math.prod, block.values())) for block in self.blocks)

    @cached_property
    def block_features(self) -> int:
        """Inputs plus outputs of all linears of the largest block: its activations per token."""
        return max(sum(map(sum, block.values())) for block in self.blocks)

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
        decoder_blocks(model)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{file}: no model that transformers builds ({reason})") from None
    separate_experts(model)
    model.eval()
    blocks = tuple(model_shapes(model))
    if not any(blocks):
        raise ArtifactError(f"{file}: no linear layer in any decoder block to compress")
    stored = any((file.parent / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    if stored and file.name == "config.json":
        weights = Checkpoint(file.parent)  # its tensors are mapped, not read
        tensors = {n: torch.empty_like(weights.tensor(n), device="meta") for n in weights.names()}
    else:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        names = sorted(set(model.state_dict()) - tied)
        built = {name: model.state_dict()[name] for name in names}
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in built.items()}
    text_config = config.get_text_config()
    return ModelShapes(
        blocks=blocks,
        inputs=_inputs(model, blocks),
        tensors=tensors,
        hidden=int(text_config.hidden_size),
        vocabulary=int(text_config.vocab_size),
    )


def _inputs(model: nn.Module, blocks: tuple[dict[str, Shape], ...]) -> tuple[dict[str, int], ...]:
    """Return the widths of each block's distinct inputs, by the first linear that gets one.

    Found by a forward pass on the meta device; where an architecture cannot run there, linears that
    it did not reach count as having inputs of their own.
    """
    for module in model.modules():
        if isinstance(module, SeparateExperts):  # which tokens an expert gets is not known here
            module.forward = partial(_all_experts, module)  # type: ignore[method-assign]
    prefix, modules = decoder_blocks(model)
    seen: dict[str, Tensor] = {}
    shape = (1, TRACE_TOKENS)
    with (
        torch.no_grad(),
        linear_calls(modules, lambda call: seen.update({f"{prefix}.{call.name}": call.x})),
        suppress(RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    ):
        model.get_decoder()(  # type: ignore[operator]
            input_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
            position_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
            attention_mask=torch.zeros(1, 1, TRACE_TOKENS, TRACE_TOKENS, device="meta"),
            use_cache=False,
        )
    found = []
    for block in blocks:
        first = {id(seen.get(name, name)): name for name in reversed(block)}
        found.append({n: block[n].in_features for n in block if n in first.values()})
    return tuple(found)


def _all_experts(experts: SeparateExperts, hidden_states: Tensor, *_: Tensor) -> Tensor:
    for expert in experts:
        expert(hidden_states.clone())  # each has an input of its own
    return hidden_states
