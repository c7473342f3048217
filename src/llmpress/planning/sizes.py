"""The bytes of every artifact, counted from shapes and settings.

Tensor files are exact where a method's layers follow from its settings: payload, header and shards
as safetensors and the writers lay them out. Records (JSON) are taken for as long as they usually
are, which is within some percent.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmpress.calibration.settings import CalibrationSettings
from llmpress.methods.base import Method
from llmpress.models.checkpoints.compressed import REST_DTYPE
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.checkpoints.files import MODEL_SHARD_BYTES
from llmpress.nn.layers import CompressedLinear
from llmpress.planning.shapes import ModelShapes

PROVENANCE_BYTES = 1300
PROVENANCE_FILE_BYTES = 90
RECORD_BYTES = 405
"""Of a linear in layers.json and in config.json or delta.json, without its name and settings."""

ORDER = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 F16 BF16 I32 F32 F64 I64"
"""Dtypes as safetensors calls them, in the order in which it sorts them from behind."""

Layers = Mapping[str, CompressedLinear | None]
"""The empty layer of each linear; None where it stays dense."""


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


@lru_cache(maxsize=64)
def planned_methods(model: ModelShapes, method: Method) -> Mapping[str, Method | None]:
    """Return what the method's plan gives each linear, None where it stays dense.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    return method.plan(model.linears, model.num_weights)


@lru_cache(maxsize=64)
def planned_layers(model: ModelShapes, method: Method) -> Layers:
    """Return the empty compressed layer of each linear; raises as `planned_methods` does."""
    plan = planned_methods(model, method)
    alike = {(own, model.linears[name]) for name, own in plan.items() if own is not None}
    made = {(own, shape): own.empty_layer(shape) for own, shape in alike}
    return {
        name: None if (own := plan[name]) is None else made[own, shape]
        for name, shape in model.linears.items()
    }


def safetensors_bytes(tensors: Mapping[str, Tensor], *, metadata: bool = True) -> int:
    """Return the bytes of one file; ``metadata``: whether its header says ``{"format": "pt"}``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda t: (-ORDER.index(_code(t[1])), t[0])):
        end = offset + tensor.nbytes
        entry = {"dtype": _code(tensor), "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Return the shards that a writer makes of tensors in this order."""
    made: list[dict[str, Tensor]] = [{}]
    pending = 0
    for name, tensor in tensors.items():
        if made[-1] and pending + tensor.nbytes > shard_bytes:
            made.append({})
            pending = 0
        made[-1][name] = tensor
        pending += tensor.nbytes
    return made


def compressed_model_size(model: ModelShapes, layers: Layers) -> ArtifactSize:
    """Count a compressed model with layers as of `planned_layers`."""
    replaced = {f"{name}.weight" for name, layer in layers.items() if layer}
    rest = {
        name: t.to(REST_DTYPE) if t.is_floating_point() else t
        for name, t in sorted(model.tensors.items())
        if name not in replaced
    }
    files = shards(_packed(layers) | rest, MODEL_SHARD_BYTES)
    return _folder(files, _config_bytes(model) + _record_bytes(layers), model.companion_bytes)


def trained_model_size(model: ModelShapes) -> ArtifactSize:
    """Count the folder that ``train_task`` writes: every tensor in fp32."""
    trained = model.stored_as(torch.float32)
    return _folder([trained.tensors], _config_bytes(model), model.companion_bytes)


def nf4_bytes(model: ModelShapes) -> int:
    """Return the bytes of all linears in NF4 with doubly quantized scales, as bitsandbytes does."""
    blocks = [-(-math.prod(shape) // 64) for shape in model.linears.values()]
    return sum(32 * count + count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)


def adapter_size(model: ModelShapes, rank: int, *, quantized: bool) -> ArtifactSize:
    """Count LoRA's factors; ``quantized``: and the model in NF4, with a tokenizer of its own."""
    factors = {
        f"base_model.model.{name}.lora_{key}.weight": _empty(*sides, dtype=REST_DTYPE)
        for name, (out_features, in_features) in model.linears.items()
        for key, sides in (("A", (rank, in_features)), ("B", (out_features, rank)))
    }
    size = _folder([factors], 0, model.companion_bytes * (1 + quantized))
    if not quantized:
        return size
    rest = 2 * (model.num_weights - model.linear_weights)
    return ArtifactSize(size.tensor_bytes + nf4_bytes(model) + rest, size.other_bytes, exact=False)


def delta_size(model: ModelShapes, exact_tensors: Collection[str] = ()) -> ArtifactSize:
    """Count an extracted delta.

    Args:
        model: The fine-tuned model.
        exact_tensors: Names of the tensors outside the linears that fine-tuning changed.
    """
    linears = {f"{name}.weight": _empty(*shape) for name, shape in model.linears.items()}
    return _delta(model, linears, exact_tensors, sum(map(len, linears)))


def compressed_delta_size(
    model: ModelShapes, layers: Layers, exact_tensors: Collection[str] = ()
) -> ArtifactSize:
    """Count a compressed delta; arguments as above."""
    return _delta(model, _packed(layers), exact_tensors, _record_bytes(layers))


def calibration_size(model: ModelShapes, settings: CalibrationSettings) -> ArtifactSize:
    """Count what ``calibrate`` writes: moments per block, windows, sensitivities, an index."""
    inside = {n: n.removeprefix(f"{model.prefix}.").partition(".")[2] for n in model.linears}
    moments = [{inside[name]: _empty(n, n) for name, n in block.items()} for block in model.inputs]
    counts = {"calibration": settings.windows, "validation": settings.validation_windows}
    windows = {
        name: _empty(settings.num_texts * count, settings.length, dtype=torch.int64)
        for name, count in counts.items()
    }
    felt = {n: _empty(s.out_features) for n, s in model.linears.items()}
    files = [*moments, windows, *([felt] if settings.sensitivity_windows else [])]
    return _folder(files, 150 * len(model.linears), metadata=False)


def _folder(
    files: Collection[Mapping[str, Tensor]],
    documents: int,
    copied: Collection[int] = (),
    *,
    metadata: bool = True,
) -> ArtifactSize:
    """Count a folder of safetensors, JSON, copied files and a provenance.json."""
    tensor_bytes = sum(safetensors_bytes(file, metadata=metadata) for file in files)
    listed = PROVENANCE_FILE_BYTES * (len(files) + len(copied) + 2)
    return ArtifactSize(tensor_bytes, documents + sum(copied) + PROVENANCE_BYTES + listed)


def _delta(
    model: ModelShapes, tensors: Mapping[str, Tensor], exact_tensors: Iterable[str], documents: int
) -> ArtifactSize:
    carried = {f"exact.{name}": model.tensors[name] for name in sorted(exact_tensors)}
    files = shards({**tensors, **carried}, DELTA_SHARD_BYTES)
    documents += 100 * len(model.linears) + sum(len(name) + 10 for file in files for name in file)
    return _folder(files, documents)


def _packed(layers: Layers) -> dict[str, Tensor]:
    """Return what a writer adds for compressed layers."""
    kept = {name: layer for name, layer in layers.items() if layer is not None}
    return {
        f"{name}.{key}": t for name, layer in kept.items() for key, t in layer.tensors().items()
    }


def _record_bytes(layers: Layers) -> int:
    said = {
        name: json.dumps(layer.spec(), indent=8) if layer else "" for name, layer in layers.items()
    }
    return sum(RECORD_BYTES + 2 * len(name) + 2 * len(spec) for name, spec in said.items())


def _config_bytes(model: ModelShapes) -> int:
    return len(json.dumps(model.config, indent=2, default=str))


def _code(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.").removesuffix("fn")
    for kind, short in (("uint", "U"), ("bfloat", "BF"), ("float", "F"), ("int", "I")):
        name = name.replace(kind, short)
    return name.upper()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
