"""Compress every linear layer of a model or of a delta, block by block, with a record of each."""

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llmpress.core.errors import NumericalError
from llmpress.core.resume import NOT_A_BLOCK, BlockStore
from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.models.architectures import block_linears
from llmpress.models.walk import TensorSource, progress
from llmpress.nn.layers import CompressedLinear, build_layer
from llmpress.numerics.linalg import relative_output_error, relative_weight_error


class SequentialInputs(Protocol):
    """What enters a layer once those before it are compressed: `llmpress.deltas.sequential`'s."""

    def __getitem__(self, name: str) -> InputStatistics:
        """Measure what enters a layer of the model as it is so far."""
        ...

    def changed(self, name: str, difference: Tensor) -> None:
        """Take note that a weight has changed by ``difference [out, in]``."""
        ...


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer.

    Attributes:
        name: Its full name in the model.
        kind: Storage format, ``dense`` where the layer was left as it is.
        settings: The layer's own constructor arguments: widths, ranks, numbers of entries.
        shape: ``[out, in]``.
        stored_bits: Every stored bit.
        bits_per_weight: ``stored_bits`` over the number of weights.
        relative_weight_error: ``‖W - Ŵ‖² / ‖W‖²``.
        relative_output_error: ``E‖(W - Ŵ) x‖² / E‖W x‖²`` over the calibration text; None without
            one.
        seconds: Time the method took.
        notes: What the method says of how it went, such as the dampening a factorization took.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    shape: tuple[int, int]
    stored_bits: int
    bits_per_weight: float
    relative_weight_error: float
    relative_output_error: float | None
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)

    def as_entry(self) -> dict[str, Any]:
        """Return the layer's entry in layers.json; without notes where there are none."""
        entry = asdict(self)
        return entry if self.notes else {k: v for k, v in entry.items() if k != "notes"}


def model_shapes(model: torch.nn.Module) -> list[dict[str, Shape]]:
    """Return the shapes of all compressible layers, block by block."""
    return [
        {name: Shape(linear.out_features, linear.in_features) for name, linear in linears.items()}
        for linears in block_linears(model)
    ]


def compress_layers(
    blocks: Sequence[Mapping[str, Shape]],
    source: TensorSource,
    method: Method,
    statistics: Mapping[str, InputStatistics] | None,
    *,
    model_weights: int,
    seed: int,
    device: torch.device,
    store: BlockStore,
    sequential: SequentialInputs | None = None,
) -> Iterator[tuple[str, CompressedLinear | None, LayerRecord]]:
    """Compress layer after layer; finished blocks are taken from the store.

    Args:
        blocks: Names and shapes of the compressible layers of each block, from the bottom up.
        source: Holds a tensor ``<name>.weight [out, in]`` for each of them.
        method: How; its plan decides each layer's share of a budget.
        statistics: Input statistics by layer name.
        model_weights: Number of weights of the whole model, embeddings included.
        seed: Same seed, same bytes, in whatever order layers are done.
        device: Where to compute.
        store: Keeps finished blocks for a rerun.
        sequential: What a layer's input is once the layers before it are compressed; by default
            it is compressed for ``statistics``, which plan and record always go by.

    Yields:
        A layer's name, the compressed layer on the CPU (None where it stays dense), its record.

    Raises:
        NumericalError: A weight that cannot be compressed; names the layer.
        ValueError: The method needs statistics and a layer has none.
    """
    shapes = {name: shape for block in blocks for name, shape in block.items()}
    plan = _plan(shapes, source, method, statistics, model_weights, device, store)
    for index, block in enumerate(progress(blocks, "compress blocks")):
        finished = store.load(index)
        if finished is None:
            done = {}
            for name in block:
                done[name] = _compress_one(
                    name, source, plan[name], statistics, sequential, seed, device
                )
                _follow(sequential, name, source, done[name][0])
            store.save(
                index,
                {
                    f"{name}|{key}": tensor
                    for name, (layer, _) in done.items()
                    if layer is not None
                    for key, tensor in layer.tensors().items()
                },
                [asdict(record) for _, record in done.values()],
            )
        else:
            done = _restore(*finished)
            for name, (layer, _) in done.items():
                _follow(sequential, name, source, layer)
        for name, (layer, record) in done.items():
            yield name, layer, record


def _plan(
    shapes: Mapping[str, Shape],
    source: TensorSource,
    method: Method,
    statistics: Mapping[str, InputStatistics] | None,
    model_weights: int,
    device: torch.device,
    store: BlockStore,
) -> dict[str, Method | None]:
    """Let the method spread its budget, by each layer's sensitivity where that can be measured."""
    if statistics is None or not method.spreads_budget:
        return method.plan(shapes, model_weights)
    finished = store.load(NOT_A_BLOCK)
    if finished is None:
        sensitivity = {
            name: method.sensitivity(
                source.tensor(f"{name}.weight").to(device), _on(statistics[name], device)
            )
            for name in progress(shapes, "weigh layers")
        }
        store.save(NOT_A_BLOCK, {}, sensitivity)
    else:
        sensitivity = finished[1]
    return method.plan(shapes, model_weights, sensitivity)


def _on(statistics: InputStatistics, device: torch.device) -> InputStatistics:
    felt = statistics.output_sensitivity
    return InputStatistics(
        statistics.second_moment.to(device),
        statistics.num_tokens,
        None if felt is None else felt.to(device),
    )


def totals(records: Sequence[LayerRecord], model_weights: int) -> dict[str, float]:
    """Return the true size over all compressible layers, those that were left dense included."""
    weights = sum(r.shape[0] * r.shape[1] for r in records)
    bits = sum(r.stored_bits for r in records)
    return {
        "compressed_weights": weights,
        "stored_bits": bits,
        "bits_per_weight": bits / weights if weights else 0.0,
        "model_weights": model_weights,
    }


def _compress_one(
    name: str,
    source: TensorSource,
    method: Method | None,
    statistics: Mapping[str, InputStatistics] | None,
    sequential: SequentialInputs | None,
    seed: int,
    device: torch.device,
) -> tuple[CompressedLinear | None, LayerRecord]:
    weight = source.tensor(f"{name}.weight").to(device)
    known = None
    if method is not None and statistics is not None and method.uses_statistics:
        known = _on((statistics if sequential is None else sequential)[name], device)
    started = time.perf_counter()
    layer = None
    if method is not None:
        try:
            layer = method.compress(weight, known, seed=seed + zlib.crc32(name.encode()))
        except ValueError as error:
            raise NumericalError(f"{name}: {error}") from error
    seconds = time.perf_counter() - started
    moment = (
        statistics[name].second_moment if statistics is not None and name in statistics else None
    )
    moment = None if moment is None else moment.to(device)
    record = layer_record(name, weight, layer, moment, seconds)
    return None if layer is None else layer.cpu(), record


def _follow(
    sequential: SequentialInputs | None,
    name: str,
    source: TensorSource,
    layer: CompressedLinear | None,
) -> None:
    """Let the layers to come see what this one has become."""
    if sequential is not None and layer is not None:
        sequential.changed(name, layer.dequantize().detach() - source.tensor(f"{name}.weight"))


def layer_record(
    name: str, weight: Tensor, layer: CompressedLinear | None, moment: Tensor | None, seconds: float
) -> LayerRecord:
    """Measure a layer against its weight ``[out, in]``; ``layer`` None means left dense."""
    if layer is None:
        bits = weight.numel() * 16
        return LayerRecord(
            name,
            "dense",
            {},
            _pair(weight),
            bits,
            16.0,
            0.0,
            None if moment is None else 0.0,
            seconds,
        )
    approximation = layer.dequantize().detach()
    return LayerRecord(
        name=name,
        kind=layer.kind,
        settings=layer.spec(),
        shape=_pair(weight),
        stored_bits=layer.stored_bits(),
        bits_per_weight=layer.stored_bits() / layer.num_weights,
        relative_weight_error=relative_weight_error(weight, approximation),
        relative_output_error=(
            None if moment is None else relative_output_error(weight, approximation, moment)
        ),
        seconds=seconds,
        notes=dict(layer.notes),
    )


def _pair(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _restore(
    tensors: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[CompressedLinear | None, LayerRecord]]:
    done: dict[str, tuple[CompressedLinear | None, LayerRecord]] = {}
    for fields in records:
        record = LayerRecord(**{**fields, "shape": tuple(fields["shape"])})
        layer = None
        if record.kind != "dense":
            out_features, in_features = record.shape
            layer = build_layer(record.kind, in_features, out_features, dict(record.settings))
            prefix = f"{record.name}|"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            layer.load_state_dict(own)
        done[record.name] = (layer, record)
    return done
