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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpress.calibration.linear_calls import linear_calls
from llmpress.calibration.moments import InputMoments
from llmpress.compression.layers import model_shapes
from llmpress.core.artifacts import WEIGHTS_INDEX
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.methods.base import Method, Shape
from llmpress.models.architectures import decoder_blocks
from llmpress.models.checkpoints import files
from llmpress.models.checkpoints.compressed import kept_dtype
from llmpress.models.checkpoints.conversion import guard_name
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.experts import SeparateExperts
from llmpress.nn.layers import CompressedLinear


@dataclass(eq=False)
class ModelShapes:
    """Everything that an estimate needs to know of a model; equal only to itself.

    Attributes:
        blocks: Compressible linears of each block by full name, from the bottom up.
        inputs: Widths of each block's distinct inputs, by the first linear that gets one: a second
            moment is stored of each.
        tensors: Every stored tensor by name, on the meta device; tied ones once.
        fused: The model on the meta device, as transformers builds it.
    """

    blocks: tuple[dict[str, Shape], ...]
    inputs: tuple[dict[str, int], ...]
    tensors: Mapping[str, Tensor]
    fused: PreTrainedModel

    def __post_init__(self) -> None:
        text = self.fused.config.get_text_config()
        self.hidden: int = text.hidden_size
        self.vocabulary: int = text.vocab_size  # rows of the output embedding
        sizes = [tensor.numel() for tensor in self.tensors.values()]
        weights = [sum(map(math.prod, block.values())) for block in self.blocks]
        self.linears = {name: shape for block in self.blocks for name, shape in block.items()}
        self.num_weights, self.linear_weights = sum(sizes), sum(weights)
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.largest = max(sizes)  # entries of a tensor
        self.block_weights = max(weights)  # of the linears of a block
        # inputs and outputs of all linears of a block: its activations per token
        self.block_features = max(sum(map(sum, block.values())) for block in self.blocks)

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
    if any((folder / name).is_file() for name in (files.WEIGHTS, WEIGHTS_INDEX)):
        weights = files.Checkpoint(folder)  # its tensors are mapped, not read
        config, model = weights.config, weights.skeleton()
        stored = {n: torch.empty_like(weights.tensor(n), device="meta") for n in weights.names()}
    else:
        config = files.read_config(folder)
        model = files.empty_model(config, folder)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        built = {name: tensor.to("meta") for name, tensor in sorted(model.state_dict().items())}
        for name in getattr(model, "all_tied_weights_keys", None) or ():
            built.pop(name, None)
        stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in built.items()}
    blocks = tuple(model_shapes(model))
    if not any(blocks):
        raise ArtifactError(f"{folder}/config.json: no linear layer in any decoder block")
    return ModelShapes(blocks, _inputs(model, blocks), stored, files.fused_model(config))


@torch.no_grad()
def _inputs(model: nn.Module, blocks: tuple[dict[str, Shape], ...]) -> tuple[dict[str, int], ...]:
    """Return the widths of each block's distinct inputs, as calibration finds them.

    By a forward pass on the meta device, where no token reaches an expert. Of an architecture that
    cannot run there every linear counts as having an input of its own.
    """
    for module in model.modules():
        if isinstance(module, SeparateExperts):
            module.forward = lambda states, *_: states  # type: ignore[method-assign]
    prefix, modules = decoder_blocks(model.to("meta"))
    moments = InputMoments(modules)
    tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, 8, 8, device="meta")
    leaders: dict[str, str] = {}
    with linear_calls(modules, moments.follow), suppress(SourceError, *files.UNBUILDABLE):
        run: Any = model.get_decoder()  # type: ignore[operator]
        run(input_ids=tokens, position_ids=tokens, attention_mask=mask, use_cache=False)
        moments.complete_leaders()
        leaders = {f"{prefix}.{n}": f"{prefix}.{own}" for n, own in moments.leaders.items()}
    return tuple(
        {n: s.in_features for n, s in block.items() if leaders.get(n, n) == n} for block in blocks
    )


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
    written: Iterable[Mapping[str, Tensor]], shard_bytes: int = 2**62, *, metadata: bool = True
) -> int:
    """Return the bytes of safetensors files with these tensors, in the order of writing.

    Shards are closed before they would exceed ``shard_bytes``; with ``metadata`` headers say
    ``{"format": "pt"}``.
    """
    total, names = 0, {dtype: name for name, dtype in files.DTYPES.items()}
    for shard in (shard for tensors in written for shard in _shards(tensors, shard_bytes)):
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
    return files_bytes([_packed(model, method) | rest | last], files.MODEL_SHARD_BYTES)


def delta_bytes(model: ModelShapes, method: Method | None, exact: Collection[str] = ()) -> int:
    """Return the bytes of a delta, as it was extracted or compressed.

    ``exact`` names what fine-tuning changed of ``model`` outside the linears.
    """
    weights = {f"{name}.weight": empty(*shape) for name, shape in model.linears.items()}
    tensors = weights if method is None else _packed(model, method)
    carried = {f"exact.{name}": model.tensors[name] for name in sorted(exact)}
    return files_bytes([tensors | carried], DELTA_SHARD_BYTES)


def _packed(model: ModelShapes, method: Method) -> dict[str, Tensor]:
    """Return what a writer adds for compressed layers."""
    layers = planned_layers(model, method).items()
    return {f"{n}.{key}": t for n, (_, layer) in layers for key, t in layer.tensors().items()}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, dtype=dtype, device="meta")
