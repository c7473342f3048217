"""Compressed models read as the dense ones they stand for, one layer in memory at a time."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmpress.core.errors import ArtifactError
from llmpress.core.records import (
    DENSE,
    LayerRecord,
    Records,
    has_records,
    read_records,
    total_size,
)
from llmpress.models.architectures import compressed_linear
from llmpress.models.checkpoints.compressed import compressed_layers, is_compressed
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint, block_linears
from llmpress.nn.layers import CompressedLinear, build_layer


class CheckpointView(Checkpoint):
    """A checkpoint whose tensors are computed from another one's when they are read.

    Args:
        base: Where tensors come from; what a subclass does not change is the base's.
        folder: What the view is named after, and identified by.

    Attributes:
        base: As given.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self.config = copy.deepcopy(base.config)

    @property
    def ignored(self) -> list[str]:
        """Names in the base's files that the model has no place for."""
        return self.base.ignored

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read or compute one tensor."""
        return self.base.tensor(name)


class DenseCheckpoint(CheckpointView):
    """The dense model that a compressed one stands for: its layers' weights in fp32.

    Args:
        packed: A folder that ``compress`` or ``finetune`` wrote.

    Raises:
        ArtifactError: It lists a layer that the model does not have.
    """

    def __init__(self, packed: Checkpoint) -> None:
        super().__init__(packed, packed.folder)
        del self.config.quantization_config
        self._entries = compressed_layers(packed)
        model = self.skeleton()
        self._linears = {name: compressed_linear(name, model) for name in self._entries}

    def names(self) -> list[str]:
        """Return the names of the dense model's tensors, sorted."""
        packed = {n for n in self.base.names() if n.rpartition(".")[0] in self._entries}
        biases = {name for name in packed if name.endswith(".bias")}
        weights = {f"{name}.weight" for name in self._entries}
        return sorted((set(self.base.names()) - packed) | biases | weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        linear = self._linears.get(name.removesuffix(".weight"))
        return tuple(linear.weight.shape) if linear is not None else self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor: a compressed layer's weight as fp32 ``[out, in]``, others as stored.

        Raises:
            ArtifactError: No such tensor, or a damaged layer.
        """
        layer = name.removesuffix(".weight")
        if layer not in self._entries:
            return self.base.tensor(name)
        return stored_layer(
            layer, self._entries[layer], self._linears[layer], self.base
        ).dequantize()


def dense_checkpoint(folder: Path) -> Checkpoint:
    """Open a plain model, or a compressed one as the dense model it stands for.

    Raises:
        ArtifactError: No model there, or a damaged one.
        SourceError: A model that transformers cannot read.
    """
    checkpoint = Checkpoint(folder)
    return DenseCheckpoint(checkpoint) if is_compressed(checkpoint) else checkpoint


def layer_records(folder: Path) -> Records | None:
    """Return the records of a compressed model or delta, None of anything else.

    A compressed model that transformers saved again has none: they are what its tensors say, and
    the errors are unknown.

    Raises:
        ArtifactError: Damaged records, or a damaged model.
    """
    if has_records(folder):
        return read_records(folder)
    if not (folder / "config.json").is_file() or not is_compressed(packed := Checkpoint(folder)):
        return None
    entries, dense = compressed_layers(packed), DenseCheckpoint(packed)
    found = []
    for block in block_linears(dense.skeleton()):
        for name, linear in block.items():
            kind, settings, shape = DENSE, {}, (linear.out_features, linear.in_features)
            if name in entries:
                layer = stored_layer(name, entries[name], linear, packed)
                layer.bias = None
                kind, settings, bits = layer.kind, layer.spec(), layer.stored_bits()
            else:
                bits = 8 * packed.tensor(f"{name}.weight").nbytes
            size = bits, bits / math.prod(shape)
            found.append(LayerRecord(name, kind, settings, shape, *size, None, None, 0.0))
    weights = sum(math.prod(dense.shape(name)) for name in dense.names())
    return Records(tuple(found), total_size(found, weights))


def stored_layer(
    name: str,
    entry: Mapping[str, Any],
    linear: nn.Linear,
    source: Checkpoint | DeltaFolder,
    device: torch.device | None = None,
) -> CompressedLinear:
    """Return a compressed layer of a model or of a delta.

    Args:
        name: Its full name.
        entry: What `llmpress.nn.layers.layer_entry` says of it.
        linear: Tells its shape and whether it has a bias.
        source: Where its tensors are.
        device: Where they are copied to; by default they stay in the file until they are read.

    Raises:
        ArtifactError: It is damaged.
    """
    tensors = source.tensors(f"{name}.")
    if device is not None:
        tensors = {key: tensor.to(device, copy=True) for key, tensor in tensors.items()}
    shape = (linear.in_features, linear.out_features)
    try:
        return build_layer(entry, *shape, tensors, bias=linear.bias is not None)
    except ValueError as error:
        raise ArtifactError(f"{source.folder}: layer {name} is damaged: {error}") from None


def delta_layer(
    name: str, delta: DeltaFolder, device: torch.device | None = None
) -> CompressedLinear:
    """Return one compressed layer of a compressed delta; arguments as above.

    Raises:
        ArtifactError: It is damaged.
    """
    entry = delta.layers[name]
    out_features, in_features = entry["shape"]
    like = nn.Linear(in_features, out_features, bias=False, device="meta")
    return stored_layer(name, entry, like, delta, device)
