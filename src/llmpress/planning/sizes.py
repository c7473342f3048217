"""The bytes of artifacts' weights, counted from shapes and settings.

Payload, headers and shards are counted as safetensors and the writers lay them out: exactly, where
a method's layers follow from its settings, else within its budget. What lies beside them (records,
configuration, tokenizer) takes some megabytes and is left out.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmpress.methods.base import Method
from llmpress.models.checkpoints.compressed import DENSE_DTYPE, kept_dtype
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.checkpoints.files import MODEL_SHARD_BYTES
from llmpress.models.quantizer import guard_name
from llmpress.nn.layers import CompressedLinear
from llmpress.planning.shapes import ModelShapes

DTYPES = (
    {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8"}
    | {torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3"}
    | {torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16"}
    | {torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
)
"""What safetensors calls them, in the order in which it sorts them from behind."""


class Planned(NamedTuple):
    """What a linear gets: a method's settings, and the empty layer that they make of it."""

    method: Method
    layer: CompressedLinear


@lru_cache(maxsize=64)
def planned_layers(model: ModelShapes, method: Method) -> Mapping[str, Planned]:
    """Return what the method's plan gives each linear; those that stay dense are left out.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    plan = method.plan(model.linears, model.num_weights)
    layer = cache(lambda own, shape: own.empty_layer(shape))
    chosen = ((name, plan[name], shape) for name, shape in model.linears.items())
    return {name: Planned(own, layer(own, shape)) for name, own, shape in chosen if own}


def files_bytes(
    files: Iterable[Mapping[str, Tensor]], shard_bytes: int = 2**62, *, metadata: bool = True
) -> int:
    """Return the bytes of safetensors files.

    Args:
        files: The tensors of each, in the order of writing, on the meta device.
        shard_bytes: A shard is closed before it would exceed this.
        metadata: Whether headers say ``{"format": "pt"}``.
    """
    total, order = 0, list(DTYPES)
    for shard in (shard for file in files for shard in _shards(file, shard_bytes)):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
        end = 0
        for name, tensor in sorted(shard.items(), key=lambda t: (-order.index(t[1].dtype), t[0])):
            about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
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
        name: t.to(kept_dtype(t, linear=name.removesuffix(".weight") in model.linears))
        for name, t in sorted(model.tensors.items())
        if name.removesuffix(".weight") not in layers
    }
    guard = {guard_name(layers): empty(0, dtype=torch.uint8)} if layers else {}
    return files_bytes([_packed(layers) | rest | guard], MODEL_SHARD_BYTES)


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
    tensors = weights if method is None else _packed(planned_layers(model, method))
    carried = {f"exact.{name}": model.tensors[name] for name in sorted(changed)}
    return files_bytes([tensors | carried], DELTA_SHARD_BYTES)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _packed(layers: Mapping[str, Planned]) -> dict[str, Tensor]:
    """Return what a writer adds for compressed layers."""
    return {f"{n}.{key}": t for n, own in layers.items() for key, t in own.layer.tensors().items()}


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
