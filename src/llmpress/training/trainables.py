"""Which of a compressed model's parameters train, and their way from stored values and back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmpress.core.errors import ConfigError
from llmpress.nn.layers import AdaptedLinear, CompressedLinear
from llmpress.nn.layers.base import rounded_to

Parameters = Mapping[str, nn.Parameter]


def compressed_parameters(model: nn.Module, *, norms: bool) -> dict[str, nn.Parameter]:
    """Return what the compressed layers allow to train, by full name.

    Args:
        model: Holds compressed layers.
        norms: Whether the weights of all norms train too.

    Raises:
        ConfigError: No layer holds anything that may train.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    found = _of_layers(layers, "its compressed layers")
    if norms:
        found |= {
            f"{name}.weight": module.weight
            for name, module in model.named_modules()
            if "Norm" in type(module).__name__ and isinstance(module.weight, nn.Parameter)
        }
    return found


def delta_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the layers of a delta allow to train, by the names that the delta stores.

    Args:
        model: The base with the delta on it.

    Raises:
        ConfigError: No layer holds anything that may train.
    """
    layers = {n: m.delta for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    return _of_layers(layers, "the delta's layers")


def _of_layers(layers: Mapping[str, CompressedLinear], called: str) -> dict[str, nn.Parameter]:
    found = {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in layers.items()
        for key in layer.trainable
    }
    if not found:
        kinds = ", ".join(sorted({layer.kind for layer in layers.values()})) or "none"
        raise ConfigError(
            f"nothing here may train: {called} ({kinds}) hold integers only; start from a run "
            "with codebooks, factors or scales (docs/finetuning.md)"
        )
    return found


@contextmanager
def training(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Let exactly these parameters train, in fp32, until the context ends."""
    model.requires_grad_(requires_grad=False)
    layers = [layer for layer in model.modules() if isinstance(layer, CompressedLinear)]
    for layer in layers:
        layer.keep_unpacked(True)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad = True
    try:
        with rebuilding(layers):
            yield
    finally:
        model.requires_grad_(requires_grad=False)
        for layer in layers:
            layer.keep_unpacked(False)


@contextmanager
def rebuilding(layers: Sequence[CompressedLinear]) -> Iterator[None]:
    """Let layers unpack their weights again in the backward pass, until the context ends.

    None keeps unpacked weights meanwhile: what trains changes too often.
    """
    stores = [layer.dense_store for layer in layers]
    for layer in layers:
        layer.rebuilding, layer.dense_store = True, None
    try:
        yield
    finally:
        for layer, store in zip(layers, stores, strict=True):
            layer.rebuilding, layer.dense_store = False, store


def rounded(parameters: Parameters, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return copies of the parameters as they would be stored, on the CPU."""
    return {
        name: rounded_to(p.detach(), dtypes[name]).to("cpu", copy=True)
        for name, p in parameters.items()
    }


@contextmanager
def holding(parameters: Parameters, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values until the context ends."""
    masters = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = masters[name]
