"""The layout of a model: shapes and dtypes of its tensors, nothing of their values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmpress.core.errors import ArtifactError
from llmpress.methods.base import Shape
from llmpress.models.architectures import block_linears, decoder_blocks
from llmpress.models.checkpoints.files import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from llmpress.models.experts import SeparateExperts, separate_experts

TRACE_TOKENS = 8
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "*.jinja",
    "generation_config*",
)
"""What `copy_companions` of checkpoints takes over; tests hold the two together."""


class TensorSpec(NamedTuple):
    """One stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries."""
        return self.num_entries * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """Everything that an estimate needs to know of a model; equal only to itself.

    Attributes:
        prefix: Name of the list of decoder blocks, such as ``model.layers``.
        blocks: Compressible linears of each block by full name, from the bottom up.
        inputs: For each block, the width of every distinct input of its linears by the name of the
            first linear that gets it: what calibration stores a second moment of.
        leaders: For each linear, the first linear of its block with the same input.
        tensors: Every stored tensor by name; tied ones once.
        hidden: Width of the hidden states.
        vocabulary: Rows of the output embedding.
        config: The configuration as config.json holds it.
        companion_files: Bytes by name of the files that a compressed folder takes over: tokenizer,
            chat template; empty where only the configuration is known.
    """

    prefix: str
    blocks: tuple[Mapping[str, Shape], ...]
    inputs: tuple[Mapping[str, int], ...]
    leaders: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    hidden: int
    vocabulary: int
    config: Mapping[str, Any]
    companion_files: Mapping[str, int]

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """All compressible linears by full name."""
        return {name: shape for block in self.blocks for name, shape in block.items()}

    @cached_property
    def num_weights(self) -> int:
        """Number of stored entries, as ``compress`` counts the weights of the model."""
        return sum(tensor.num_entries for tensor in self.tensors.values())

    @cached_property
    def linear_weights(self) -> int:
        """Number of weights that methods compress."""
        return sum(math.prod(shape) for shape in self.linears.values())

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @cached_property
    def block_weights(self) -> int:
        """Entries of the largest block, norms included."""
        sizes: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(f"{self.prefix}."):
                index = name.removeprefix(f"{self.prefix}.").partition(".")[0]
                sizes[index] = sizes.get(index, 0) + tensor.num_entries
        return max(sizes.values())

    @cached_property
    def block_features(self) -> int:
        """Inputs plus outputs of all linears of the largest block: its activations per token."""
        return max(sum(sum(shape) for shape in block.values()) for block in self.blocks)

    def stored_as(self, dtype: torch.dtype) -> "ModelShapes":
        """Return the same layout with every tensor stored in ``dtype``."""
        tensors = {n: TensorSpec(dtype, t.shape) for n, t in self.tensors.items()}
        return replace(self, tensors=tensors)


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
    has_weights = any((file.parent / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
    has_weights = has_weights and file.name == "config.json"
    tensors = _stored_tensors(file.parent) if has_weights else _expected_tensors(model, config)
    blocks = [
        {name: Shape(m.out_features, m.in_features) for name, m in linears.items()}
        for linears in block_linears(model)
    ]
    if not any(blocks):
        raise ArtifactError(f"{file}: no linear layer in any decoder block to compress")
    leaders = _leaders(model)
    linears = {name: shape for block in blocks for name, shape in block.items()}
    inputs = tuple(
        {leaders[name]: linears[leaders[name]].in_features for name in block} for block in blocks
    )
    companions = {
        path.name: path.stat().st_size
        for pattern in (COMPANIONS if has_weights else ())
        for path in file.parent.glob(pattern)
    }
    text_config = config.get_text_config()
    return ModelShapes(
        prefix=prefix,
        blocks=tuple(blocks),
        inputs=inputs,
        leaders=leaders,
        tensors=tensors,
        hidden=int(text_config.hidden_size),
        vocabulary=int(text_config.vocab_size),
        config=config.to_diff_dict(),
        companion_files=companions,
    )


def _stored_tensors(folder: Path) -> dict[str, TensorSpec]:
    checkpoint = Checkpoint(folder)
    # Tensors are mapped from their file, not read: only dtypes and shapes are looked at.
    tensors = ((name, checkpoint.tensor(name)) for name in checkpoint.names())
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


def _expected_tensors(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, TensorSpec]:
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: TensorSpec(dtype if t.is_floating_point() else t.dtype, tuple(t.shape))
        for name, t in sorted(model.state_dict().items())
        if name not in tied
    }


def _leaders(model: PreTrainedModel) -> dict[str, str]:
    """Return, for each linear of the blocks, the first one of its block with the same input.

    Found by a forward pass on the meta device. Where an architecture cannot run there, blocks take
    over what an equal block showed, and linears that never ran count as having inputs of their own.
    """
    blocks = block_linears(model)
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def listen(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return listen

    hooks = [
        linear.register_forward_pre_hook(note(name))
        for linears in blocks
        for name, linear in linears.items()
    ]
    mixtures = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    for mixture in mixtures:  # which tokens an expert gets is not known here
        mixture.forward = partial(_all_experts, mixture)  # type: ignore[method-assign]
    shape = (1, TRACE_TOKENS)
    try:
        with torch.no_grad():
            model.get_decoder()(
                input_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
                position_ids=torch.zeros(shape, dtype=torch.int64, device="meta"),
                attention_mask=torch.zeros(1, 1, TRACE_TOKENS, TRACE_TOKENS, device="meta"),
                use_cache=False,
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        pass  # linears that were not reached are dealt with below
    finally:
        for hook in hooks:
            hook.remove()
        for mixture in mixtures:
            del mixture.forward
    leaders: dict[str, str] = {}
    known: dict[tuple[str, ...], list[int]] = {}
    for linears in blocks:
        names = list(linears)
        layout = tuple(name.split(".", 3)[-1] for name in names)
        if all(name in inputs for name in names):
            first = [next(i for i, n in enumerate(names) if inputs[n] is inputs[m]) for m in names]
            known.setdefault(layout, first)
        else:
            first = known.get(layout) or _partly_known(names, inputs)
        leaders.update({name: names[i] for name, i in zip(names, first, strict=True)})
    return leaders


def _all_experts(
    experts: SeparateExperts, hidden_states: torch.Tensor, *_: torch.Tensor
) -> torch.Tensor:
    for expert in experts:
        expert(hidden_states.clone())  # each has an input of its own
    return hidden_states


def _partly_known(names: list[str], inputs: Mapping[str, torch.Tensor]) -> list[int]:
    return [
        next(
            i for i, n in enumerate(names) if n == m or (n in inputs and inputs[n] is inputs.get(m))
        )
        for m in names
    ]
