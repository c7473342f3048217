"""The bytes of every artifact, counted from shapes and settings.

Tensor files are exact where a method's layers follow from its settings: payload, header, shards and
index as safetensors and the writers lay them out. Records (JSON) are printed here with numbers of
typical length, which is within some percent.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from llmpress.compression.records import LayerRecord
from llmpress.methods.base import Method
from llmpress.nn.layers import CompressedLinear
from llmpress.planning.costs import compressed_layer
from llmpress.planning.shapes import ModelShapes, TensorSpec

REST_DTYPE = torch.bfloat16
MODEL_SHARD_BYTES = 2 << 30
DELTA_SHARD_BYTES = 1 << 30
LARGEST_HUB_SHARD_BYTES = 50 * 10**9
PROVENANCE_BYTES = 1300
PROVENANCE_FILE_BYTES = 90
TYPICAL_NUMBER = 0.0123456789012345678
"""Prints as long as most errors and seconds of a record."""

Tensors = Mapping[str, TensorSpec]
NamedTensor = tuple[str, TensorSpec]

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of dtypes in a safetensors header, in the order in which it sorts them from behind."""


@dataclass(frozen=True)
class ArtifactSize:
    """Bytes of one artifact folder.

    Attributes:
        tensor_bytes: Of all its safetensors files.
        other_bytes: Of records, configuration, tokenizer and provenance.
        exact: Whether ``tensor_bytes`` is exact; otherwise the values decide, within a budget.
    """

    tensor_bytes: int
    other_bytes: int
    exact: bool = True

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole folder."""
        return self.tensor_bytes + self.other_bytes


def safetensors_bytes(tensors: Iterable[NamedTensor], metadata: bool = True) -> int:
    """Return the bytes of one safetensors file.

    Args:
        tensors: Names, dtypes and shapes.
        metadata: Whether the header carries ``{"format": "pt"}``.
    """
    order = list(_NAMES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    offset = 0
    for name, tensor in sorted(tensors, key=lambda item: (-order.index(item[1].dtype), item[0])):
        end = offset + tensor.num_bytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def sharded_bytes(tensors: Iterable[NamedTensor], shard_bytes: int) -> tuple[int, list[list[str]]]:
    """Return the bytes of the files that a writer makes of tensors in this order, and the shards.

    Args:
        tensors: In the order in which they are added.
        shard_bytes: A shard is closed before it would exceed this.
    """
    shards: list[list[NamedTensor]] = [[]]
    pending = 0
    for name, tensor in tensors:
        if shards[-1] and pending + tensor.num_bytes > shard_bytes:
            shards.append([])
            pending = 0
        shards[-1].append((name, tensor))
        pending += tensor.num_bytes
    files = [shard for shard in shards if shard]
    return (
        sum(safetensors_bytes(shard) for shard in files),
        [[name for name, _ in shard] for shard in files],
    )


def layer_tensors(name: str, layer: CompressedLinear) -> list[NamedTensor]:
    """Return what a writer adds for one compressed layer."""
    return [
        (f"{name}.{key}", TensorSpec(t.dtype, tuple(t.shape))) for key, t in layer.tensors().items()
    ]


@lru_cache(maxsize=64)
def planned_methods(model: ModelShapes, method: Method) -> Mapping[str, Method | None]:
    """Return what the method's plan gives each linear, None where it stays dense."""
    return method.plan(model.linears, model.num_weights)


@lru_cache(maxsize=64)
def planned_layers(model: ModelShapes, method: Method) -> Mapping[str, CompressedLinear | None]:
    """Return the empty compressed layer of each linear, None where the plan leaves it dense.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    plan = planned_methods(model, method)
    return {
        name: None if (own := plan[name]) is None else compressed_layer(own, shape)
        for name, shape in model.linears.items()
    }


def compressed_model_size(
    model: ModelShapes,
    layers: Mapping[str, CompressedLinear | None],
    *,
    exact: bool,
    blocks: int = 0,
) -> ArtifactSize:
    """Count a folder of `llmpress.compression.writing`.

    Args:
        model: What is compressed.
        layers: See `planned_layers`.
        exact: Whether the layers are exactly those that will be made.
        blocks: Records of finetuned blocks in layers.json.
    """
    kept = {name: layer for name, layer in layers.items() if layer is not None}
    packed = [t for name, layer in kept.items() for t in layer_tensors(name, layer)]
    rest = [
        (name, TensorSpec(REST_DTYPE, t.shape) if t.dtype.is_floating_point else t)
        for name, t in sorted(model.tensors.items())
        if name.removesuffix(".weight") not in kept or not name.endswith(".weight")
    ]
    num_bytes, shards = sharded_bytes([*packed, *rest], MODEL_SHARD_BYTES)
    entries = {name: {"kind": layer.kind, "spec": layer.spec()} for name, layer in kept.items()}
    quantization = {"quant_method": "llmpress", "format_version": 1, "layers": entries}
    config = {**model.config, "architectures": [""], "quantization_config": quantization}
    records = {
        "layers": [_record(name, layers[name], model) for name in model.linears],
        "totals": dict.fromkeys(("stored_bits", "bits_per_weight", "model_weights"), 123456789),
        "blocks": [_block_record()] * blocks,
    }
    other = _json_bytes(config) + _json_bytes(records) + sum(model.companion_files.values())
    if len(shards) > 1:
        where = {n: "model-00001-of-00001.safetensors" for shard in shards for n in shard}
        other += _json_bytes({"metadata": {"total_size": num_bytes}, "weight_map": where})
    files = 3 + len(model.companion_files) + len(shards)
    return ArtifactSize(num_bytes, other + _provenance_bytes(files), exact)


def trained_model_size(model: ModelShapes) -> ArtifactSize:
    """Count the folder that ``train_task`` writes: every tensor in fp32."""
    trained = model.stored_as(torch.float32)
    num_bytes, shards = sharded_bytes(trained.tensors.items(), LARGEST_HUB_SHARD_BYTES)
    other = _json_bytes(model.config) + sum(model.companion_files.values())
    return ArtifactSize(num_bytes, other + _provenance_bytes(3 + len(shards)))


def nf4_bytes(model: ModelShapes) -> int:
    """Return the bytes of all linears in NF4 with doubly quantized scales, as bitsandbytes does."""
    blocks = [-(-math.prod(shape) // 64) for shape in model.linears.values()]
    return sum(32 * count + count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)


def adapter_size(model: ModelShapes, rank: int, *, quantized: bool) -> ArtifactSize:
    """Count an adapter folder of `llmpress.models.adapters`.

    Args:
        model: What it lies beside.
        rank: Of every adapter.
        quantized: Whether the folder holds the model in NF4 too.
    """
    factors = [
        (f"base_model.model.{name}.lora_{key}.weight", TensorSpec(REST_DTYPE, sides))
        for name, shape in model.linears.items()
        for key, sides in (
            ("A", (rank, shape.in_features)),
            ("B", (shape.out_features, rank)),
        )
    ]
    num_bytes = safetensors_bytes(factors)
    other = sum(model.companion_files.values())
    if quantized:
        linear = {f"{name}.weight" for name in model.linears}
        rest = sum(2 * t.num_entries for name, t in model.tensors.items() if name not in linear)
        num_bytes += nf4_bytes(model) + rest
        other *= 2
    files = 3 + len(model.companion_files) * (1 + quantized)
    return ArtifactSize(num_bytes, other + _provenance_bytes(files), exact=not quantized)


def delta_size(model: ModelShapes, exact_tensors: Collection[str] = ()) -> ArtifactSize:
    """Count the folder that ``extract_delta`` writes.

    Args:
        model: The fine-tuned model.
        exact_tensors: Names of the tensors outside the linears that fine-tuning changed.
    """
    linears = [
        (f"{name}.weight", TensorSpec(torch.float32, tuple(s))) for name, s in model.linears.items()
    ]
    kept = [(f"exact.{name}", model.tensors[name]) for name in sorted(exact_tensors)]
    num_bytes, shards = sharded_bytes([*linears, *kept], DELTA_SHARD_BYTES)
    header = {
        "linears": {name: list(shape) for name, shape in model.linears.items()},
        "exact": {name: model.tensors[name].num_entries for name in exact_tensors},
        "unchanged": sorted(set(model.tensors) - {f"{n}.weight" for n in model.linears}),
        "files": dict(enumerate(shards)),
        "base": dict.fromkeys(("name", "fingerprint"), "f" * 64),
        "finetuned": dict.fromkeys(("name", "fingerprint"), "f" * 64),
    }
    return ArtifactSize(num_bytes, _json_bytes(header) + _provenance_bytes(1 + len(shards)))


def compressed_delta_size(
    model: ModelShapes,
    layers: Mapping[str, CompressedLinear | None],
    *,
    exact: bool,
    exact_tensors: Collection[str] = (),
) -> ArtifactSize:
    """Count the folder that ``compress_delta`` writes; arguments as above."""
    kept = {name: layer for name, layer in layers.items() if layer is not None}
    packed = [t for name, layer in kept.items() for t in layer_tensors(name, layer)]
    carried = [(f"exact.{name}", model.tensors[name]) for name in sorted(exact_tensors)]
    num_bytes, shards = sharded_bytes([*packed, *carried], DELTA_SHARD_BYTES)
    header = {
        "layers": {
            name: {"kind": layer.kind, "spec": layer.spec(), "shape": list(model.linears[name])}
            for name, layer in kept.items()
        },
        "exact": {name: model.tensors[name].num_entries for name in exact_tensors},
        "files": dict(enumerate(shards)),
        "base": dict.fromkeys(("name", "fingerprint"), "f" * 64),
        "finetuned": dict.fromkeys(("name", "fingerprint"), "f" * 64),
    }
    rows = [_record(name, layer, model) | {"method": "delta_come"} for name, layer in kept.items()]
    other = _json_bytes(header) + _json_bytes({"layers": rows})
    return ArtifactSize(num_bytes, other + _provenance_bytes(2 + len(shards)), exact)


def calibration_size(
    model: ModelShapes, windows: int, validation: int, length: int, *, sensitive: bool
) -> ArtifactSize:
    """Count the folder that ``calibrate`` writes: moments per block, token windows, an index.

    Args:
        model: What is calibrated.
        windows: Calibration windows of all corpora together.
        validation: Validation windows of all corpora together.
        length: Tokens of a window.
        sensitive: Whether the outputs' sensitivity is measured.
    """
    prefix = len(model.prefix) + 1
    num_bytes = sum(
        safetensors_bytes(
            [
                (leader[prefix:].partition(".")[2], TensorSpec(torch.float32, (n, n)))
                for leader, n in inputs.items()
            ],
            metadata=False,
        )
        for inputs in model.inputs
    )
    tokens = {"calibration": windows, "validation": validation}
    num_bytes += safetensors_bytes(
        [(name, TensorSpec(torch.int64, (count, length))) for name, count in tokens.items()],
        metadata=False,
    )
    index = {
        name: ("moments-000.safetensors", leader[prefix:].partition(".")[2])
        for name, leader in model.leaders.items()
    }
    felt = sorted(model.linears) if sensitive else []
    if felt:
        num_bytes += safetensors_bytes(
            [(n, TensorSpec(torch.float32, (model.linears[n].out_features,))) for n in felt],
            metadata=False,
        )
    other = _json_bytes({"num_tokens": windows * length, "layers": index, "sensitivity": felt})
    files = 2 + len(model.blocks) + bool(felt)
    return ArtifactSize(num_bytes, other + _provenance_bytes(files))


def checkpoint_bytes(layers: Mapping[str, CompressedLinear | None]) -> int:
    """Return the bytes of the scratch files of a compression: all compressed layers once more."""
    return sum(
        sum(tensor.num_bytes for _, tensor in layer_tensors(name, layer))
        for name, layer in layers.items()
        if layer is not None
    )


def _record(name: str, layer: CompressedLinear | None, model: ModelShapes) -> dict[str, Any]:
    shape = model.linears[name]
    record = LayerRecord(
        name=name,
        kind="dense" if layer is None else layer.kind,
        settings={} if layer is None else layer.spec(),
        shape=(shape.out_features, shape.in_features),
        stored_bits=(16 * shape.out_features * shape.in_features)
        if layer is None
        else layer.stored_bits(),
        bits_per_weight=16.0 if layer is None else layer.stored_bits() / layer.num_weights,
        relative_weight_error=TYPICAL_NUMBER,
        relative_output_error=TYPICAL_NUMBER,
        seconds=TYPICAL_NUMBER,
    )
    return record.as_entry()


def _block_record() -> dict[str, Any]:
    losses = [TYPICAL_NUMBER] * 3
    return {
        **dict.fromkeys(("index", "loss_before", "loss_after", "kept", "seconds"), TYPICAL_NUMBER),
        **dict.fromkeys(("train_loss", "validation_loss"), losses),
    }


def _provenance_bytes(files: int) -> int:
    return PROVENANCE_BYTES + PROVENANCE_FILE_BYTES * files


def _json_bytes(value: Any) -> int:
    printer: Callable[[Any], str] = str
    return len(json.dumps(value, indent=2, default=printer)) + 1
