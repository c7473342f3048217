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


def layer_entry(kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an artifact lists of a layer, JSON-representable: `build_layer` takes it."""
    return {"kind": kind, "spec": spec}


def layer_class(entry: Mapping[str, Any]) -> type[CompressedLinear]:
    """Return the class of a listed layer.

    Raises:
        ValueError: An unknown kind.
    """
    kind = entry.get("kind")
    if kind not in KINDS:
        raise ValueError(f"layer kind {kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    return KINDS[kind]


def build_layer(
    entry: Mapping[str, Any],
    in_features: int,
    out_features: int,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    bias: bool = False,
) -> CompressedLinear:
    """Build a stored layer around its tensors, which are not copied.

    Args:
        entry: What `layer_entry` says of it.
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        tensors: Everything the layer stores, by name; None leaves it empty, on the meta device.
        bias: Whether a bias is among them.

    Raises:
        ValueError: An unknown kind, a spec that the kind does not take, or tensors that are missing
            or of another shape.
    """
    kind, spec = layer_class(entry), entry.get("spec")
    try:
        with torch.device("meta"):
            layer = kind(in_features, out_features, bias=bias, **dict(spec or {}))
        if tensors is not None:
            layer.load_state_dict(dict(tensors), assign=True)
    except TypeError as error:
        raise ValueError(f"layer kind {kind.kind!r} does not take {spec}: {error}") from None
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
    "keep_dense",
    "layer_class",
    "layer_entry",
]
