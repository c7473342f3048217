"""The layout of a model, and the bytes of the weights that are made of it: nothing is read of them.

Payload, headers and shards are counted as safetensors and the writers lay them out: exactly, where
a method's layers follow from its settings, else within its budget. What lies beside them (records,
configuration, tokenizer) takes some megabytes and is left out.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmpress.calibration.linear_calls import linear_calls
from llmpress.compression.layers import model_shapes
from llmpress.core.artifacts import WEIGHTS_INDEX
from llmpress.core.errors import ArtifactError
from llmpress.methods.base import Method, Shape
from llmpress.models.architectures import decoder_blocks
from llmpress.models.checkpoints.compressed import DENSE_DTYPE, kept_dtype
from llmpress.models.checkpoints.conversion import guard_name
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.checkpoints.files import (
    DTYPES,
    MODEL_SHARD_BYTES,
    WEIGHTS,
    Checkpoint,
    empty_model,
    fused_model,
    read_config,
)
from llmpress.models.experts import SeparateExperts
from llmpress.nn.layers import CompressedLinear

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
        config: What transformers builds the model of.
    """

    blocks: tuple[dict[str, Shape], ...]
    inputs: tuple[dict[str, int], ...]
    tensors: Mapping[str, Tensor]
    hidden: int
    vocabulary: int
    config: PretrainedConfig

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """All compressible linears by full name."""
        return {name: shape for block in self.blocks for name, shape in block.items()}

    @cached_property
    def fused(self) -> PreTrainedModel:
        """The model on the meta device, as transformers builds it."""
        return fused_model(self.config)

    @cached_property
    def num_weights(self) -> int:
        """Number of stored entries, as ``compress`` counts the weights of the model."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def largest(self) -> int:
        """Number of entries of the largest tensor."""
        return max(tensor.numel() for tensor in self.tensors.values())

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
        source: A Hugging Face folder, with or without weights, or its config.json.

    Raises:
        ArtifactError: No configuration there, or nothing in the model to compress.
        SourceError: A configuration that transformers makes no model of.
    """
    folder = source.parent if source.name == "config.json" else source
    if any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        weights = Checkpoint(folder)  # its tensors are mapped, not read
        config, model = weights.config, weights.skeleton()
        stored = {n: torch.empty_like(weights.tensor(n), device="meta") for n in weights.names()}
    else:
        config = read_config(folder)
        model = empty_model(config, folder)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        built = {name: tensor.to("meta") for name, tensor in sorted(model.state_dict().items())}
        for name in getattr(model, "all_tied_weights_keys", None) or ():
            built.pop(name, None)
        stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in built.items()}
    blocks = tuple(model_shapes(model))
    if not any(blocks):
        raise ArtifactError(f"{folder}/config.json: no linear layer in any decoder block")
    text_config = config.get_text_config()
    inputs = _inputs(model, blocks)
    sizes = (text_config.hidden_size, text_config.vocab_size)
    return ModelShapes(blocks, inputs, stored, *sizes, config)


def _inputs(model: nn.Module, blocks: tuple[dict[str, Shape], ...]) -> tuple[dict[str, int], ...]:
    """Return the widths of each block's distinct inputs, by the first linear that gets one.

    Found by a forward pass on the meta device; where an architecture cannot run there, linears that
    it did not reach count as having inputs of their own.
    """
    for module in model.modules():
        if isinstance(module, SeparateExperts):  # which tokens an expert gets is not known here
            module.forward = partial(_all_experts, module)  # type: ignore[method-assign]
    prefix, modules = decoder_blocks(model.to("meta"))
    seen: dict[str, Tensor] = {}
    tokens = torch.zeros(1, TRACE_TOKENS, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, TRACE_TOKENS, TRACE_TOKENS, device="meta")
    with (
        torch.no_grad(),
        linear_calls(modules, lambda call: seen.update({f"{prefix}.{call.name}": call.x})),
        suppress(RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    ):
        run: Any = model.get_decoder()  # type: ignore[operator]
        run(input_ids=tokens, position_ids=tokens, attention_mask=mask, use_cache=False)
    found = []
    for block in blocks:
        first = {id(seen.get(name, name)): name for name in reversed(block)}
        found.append({n: block[n].in_features for n in block if n in first.values()})
    return tuple(found)


def _all_experts(experts: SeparateExperts, hidden_states: Tensor, *_: Tensor) -> Tensor:
    for expert in experts:
        expert(hidden_states.clone())  # each has an input of its own
    return hidden_states


@lru_cache(maxsize=64)
def planned_layers(
    model: ModelShapes, method: Method
) -> Mapping[str, tuple[Method, CompressedLinear]]:
    """Return what the method's plan gives each linear: settings, and the empty layer they make.

    Linears that stay dense are left out.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    plan = method.plan(model.linears, model.num_weights)
    layer = cache(lambda own, shape: own.empty_layer(shape))
    chosen = ((name, plan[name], shape) for name, shape in model.linears.items())
    return {name: (own, layer(own, shape)) for name, own, shape in chosen if own}


def files_bytes(
    files: Iterable[Mapping[str, Tensor]], shard_bytes: int = 2**62, *, metadata: bool = True
) -> int:
    """Return the bytes of safetensors files.

    Args:
        files: The tensors of each, in the order of writing, on the meta device.
        shard_bytes: A shard is closed before it would exceed this.
        metadata: Whether headers say ``{"format": "pt"}``.
    """
    total, names = 0, {dtype: name for name, dtype in DTYPES.items()}
    for shard in (shard for file in files for shard in _shards(file, shard_bytes)):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
        end = 0
        for name, tensor in sorted(shard.items(), key=lambda t: ([*names].index(t[1].dtype), t[0])):
            about = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
            header[name] = {**about, "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        total += 8 + -(-length // 8) * 8 + end
    return total


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[Mapping[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    pending = 0
    for name, tensor in tensors.items():
        if shard and pending + tensor.nbytes > shard_bytes:
            yield shard
            shard, pending = {}, 0
        shard[name] = tensor
        pending += tensor.nbytes
    yield shard


def model_bytes(model: ModelShapes, method: Method) -> int:
    """Return the bytes of a compressed model; raises as `planned_layers` does."""
    layers = planned_layers(model, method)
    rest = {
        name: t.to(kept_dtype(t.dtype, linear=name.removesuffix(".weight") in model.linears))
        for name, t in sorted(model.tensors.items())
        if name.removesuffix(".weight") not in layers
    }
    guard = guard_name(model.fused, layers)
    last = {guard: empty(0, dtype=torch.uint8)} if guard else {}
    return files_bytes([_packed(model, method) | rest | last], MODEL_SHARD_BYTES)


def delta_bytes(
    model: ModelShapes, method: Method | None, exact_tensors: Collection[str] | None = ()
) -> int:
    """Return the bytes of a delta; raises as `planned_layers` does.

    Args:
        model: The fine-tuned model.
        method: What compresses it; None where it is as it was extracted.
        exact_tensors: Names of the tensors outside the linears that fine-tuning changed; None where
            that is not known, which counts all of them.
    """
    weights = {f"{name}.weight": empty(*shape) for name, shape in model.linears.items()}
    changed = set(model.tensors) - set(weights) if exact_tensors is None else exact_tensors
    tensors = weights if method is None else _packed(model, method)
    carried = {f"exact.{name}": model.tensors[name] for name in sorted(changed)}
    return files_bytes([tensors | carried], DELTA_SHARD_BYTES)


def _packed(model: ModelShapes, method: Method) -> dict[str, Tensor]:
    """Return what a writer adds for compressed layers."""
    layers = planned_layers(model, method).items()
    return {f"{n}.{key}": t for n, (_, layer) in layers for key, t in layer.tensors().items()}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def adapter_bytes(model: ModelShapes, rank: int, *, quantized: bool) -> int:
    """Return the bytes of LoRA's factors; ``quantized``: and those of the model in NF4, about."""
    factors = {
        f"base_model.model.{name}.lora_{key}.weight": empty(*sides, dtype=DENSE_DTYPE)
        for name, (out_features, in_features) in model.linears.items()
        for key, sides in (("A", (rank, in_features)), ("B", (out_features, rank)))
    }
    rest = nf4_bytes(model) + 2 * (model.num_weights - model.linear_weights)
    return files_bytes([factors]) + (rest if quantized else 0)


def nf4_bytes(model: ModelShapes) -> int:
    """Return the bytes of all linears in NF4 with doubly quantized scales, as bitsandbytes does."""
    blocks = [-(-shape.num_weights // 64) for shape in model.linears.values()]
    return sum(32 * count + count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)
