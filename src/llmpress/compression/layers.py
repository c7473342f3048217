"""Compress every linear layer of a model or of a delta, block by block, with a record of each."""

import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from llmpress.core.errors import NumericalError
from llmpress.core.progress import progress
from llmpress.core.records import DENSE, LayerRecord
from llmpress.core.resume import NOT_A_BLOCK, BlockStore
from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.methods.registry import method_name
from llmpress.models.architectures import block_linears
from llmpress.models.checkpoints.compressed import kept_dtype
from llmpress.models.walk import TensorSource
from llmpress.nn.layers import CompressedLinear, build_layer, layer_entry
from llmpress.numerics.linalg import relative_output_error, relative_weight_error

logger = logging.getLogger(__name__)


class SequentialInputs(Protocol):
    """What enters a layer once those before it are compressed: `llmpress.deltas.sequential`'s."""

    def __getitem__(self, name: str) -> InputStatistics:
        """Measure what enters a layer of the model as it is so far."""
        ...

    def changed(self, name: str, difference: Tensor) -> None:
        """Take note that a weight has changed by ``difference [out, in]``."""
        ...


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
    if statistics is None and method.need == "used":
        logger.warning("note: %s does better with calibration (text)", method_name(method))
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
    record = _measured(name, weight, layer, moment, seconds)
    return None if layer is None else layer.cpu(), record


def _measured(
    name: str, weight: Tensor, layer: CompressedLinear | None, moment: Tensor | None, seconds: float
) -> LayerRecord:
    """Measure a layer against its weight ``[out, in]``; ``layer`` None means left dense."""
    weight_error = output_error = 0.0
    if layer is not None:
        approximation = layer.dequantize().detach()
        weight_error = relative_weight_error(weight, approximation)
        if moment is not None:
            output_error = relative_output_error(weight, approximation, moment)
    kept = 8 * kept_dtype(weight.dtype, linear=True).itemsize * weight.numel()
    bits = kept if layer is None else layer.stored_bits()
    return LayerRecord(
        name=name,
        kind=DENSE if layer is None else layer.kind,
        settings={} if layer is None else layer.spec(),
        shape=(weight.shape[0], weight.shape[1]),
        stored_bits=bits,
        bits_per_weight=bits / weight.numel(),
        relative_weight_error=weight_error,
        relative_output_error=None if moment is None else output_error,
        seconds=seconds,
        notes={} if layer is None else dict(layer.notes),
    )


def _follow(
    sequential: SequentialInputs | None,
    name: str,
    source: TensorSource,
    layer: CompressedLinear | None,
) -> None:
    """Let the layers to come see what this one has become."""
    if sequential is not None and layer is not None:
        sequential.changed(name, layer.dequantize().detach() - source.tensor(f"{name}.weight"))


def _restore(
    tensors: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[CompressedLinear | None, LayerRecord]]:
    done: dict[str, tuple[CompressedLinear | None, LayerRecord]] = {}
    for fields in records:
        record = LayerRecord(**{**fields, "shape": tuple(fields["shape"])})
        layer = None
        if record.kind != DENSE:
            out_features, in_features = record.shape
            prefix = f"{record.name}|"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            entry = layer_entry(record.kind, record.settings)
            layer = build_layer(entry, in_features, out_features, own)
        done[record.name] = (layer, record)
    return done
