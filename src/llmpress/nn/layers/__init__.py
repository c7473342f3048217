"""Linear layers that compute from compressed weights, one file per storage format."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmpress.nn.layers.base import KINDS, CompressedLinear
from llmpress.nn.layers.delta import AdaptedLinear
from llmpress.nn.layers.dense_store import DenseStore

STORE = "_llmpress_dense_store"

for _file in pkgutil.iter_modules(__path__):  # each layer enters itself into KINDS
    importlib.import_module(f"{__name__}.{_file.name}")


def keep_dense(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> DenseStore:
    """Let compressed layers keep unpacked weights, all of one model within one limit.

    Args:
        model: The model; carries the store.
        layers: Layers that are to join it; by default all of the model's.
    """
    store: DenseStore = getattr(model, STORE, None) or DenseStore()
    setattr(model, STORE, store)
    for layer in model.modules() if layers is None else layers:
        if isinstance(layer, CompressedLinear):
            layer.dense_store = store
    return store


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of unpacked weights that a model's layers keep at the moment."""
    store: DenseStore | None = getattr(model, STORE, None)
    return store.held if store is not None else 0


def build_layer(
    kind: str, in_features: int, out_features: int, spec: dict[str, Any], *, bias: bool = False
) -> CompressedLinear:
    """Build an empty layer of a stored kind; fill it with ``load_state_dict``.

    Raises:
        ValueError: An unknown kind, or a spec that the kind does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"layer kind {kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    try:
        return KINDS[kind](in_features, out_features, bias=bias, **spec)
    except TypeError as error:
        raise ValueError(f"layer kind {kind!r} does not take {sorted(spec)}: {error}") from None


def filled_layer(
    entry: Mapping[str, Any],
    in_features: int,
    out_features: int,
    tensors: Mapping[str, Tensor],
    *,
    bias: bool = False,
) -> CompressedLinear:
    """Build a stored layer around its tensors, which are not copied.

    Args:
        entry: Its ``kind`` and ``spec``.
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        tensors: Everything the layer stores, by name.
        bias: Whether a bias is among them.

    Raises:
        ValueError: An unknown kind or spec, or tensors that are missing or of another shape.
    """
    with torch.device("meta"):
        layer = build_layer(
            entry["kind"], in_features, out_features, dict(entry["spec"]), bias=bias
        )
    try:
        layer.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return layer.requires_grad_(requires_grad=False)


__all__ = [
    "KINDS",
    "AdaptedLinear",
    "CompressedLinear",
    "DenseStore",
    "build_layer",
    "dense_bytes",
    "filled_layer",
    "keep_dense",
]
