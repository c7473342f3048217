"""Every use of a block's linear layers while it runs, in whatever way the block uses them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmpress.models.architectures import compressible

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class LinearCall(NamedTuple):
    """One use of a linear layer.

    Attributes:
        name: Of the layer inside the block.
        x: Its input.
        y: Its output, part of the graph where gradients are recorded.
        axis: Along which axis of both the features lie: the last, or the one before it.
    """

    name: str
    x: Tensor
    y: Tensor
    axis: int


Listener = Callable[[LinearCall], None]


@contextmanager
def linear_calls(block: nn.Module, listener: Listener) -> Iterator[None]:
    """Tell of every use of a block's compressible linears, inside a ``with``.

    A linear is called, or, as in Mamba's ``dt_proj``, its weight is multiplied from the left.

    Args:
        block: A decoder block.
        listener: Is told of each use.
    """

    def hook(name: str):  # type: ignore[no-untyped-def]
        def listen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            listener(LinearCall(name, inputs[0], output, -1))

        return listen

    linears = compressible(block)
    hooks = [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]
    try:
        with _LeftProducts({linear.weight: name for name, linear in linears.items()}, listener):
            yield
    finally:
        for handle in hooks:
            handle.remove()


class _LeftProducts(TorchFunctionMode):
    """Sees ``weight @ x``."""

    def __init__(self, names: Mapping[Tensor, str], listener: Listener) -> None:
        super().__init__()
        self.names, self.listener = names, listener

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and isinstance(args[0], nn.Parameter) and args[0] in self.names:
            self.listener(LinearCall(self.names[args[0]], args[1], result, -2))
        return result


def rows(features: Tensor, axis: int) -> Tensor:
    """Return ``[tokens, features]`` of a tensor whose features lie along ``axis``."""
    return features.movedim(axis, -1).flatten(0, -2)
