"""Every use of a block's linear layers while it runs, in whatever way the block uses them."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmpress.architectures import compressible

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


class LinearCalls:
    """Tells of every use of a block's compressible linears, inside one ``with``.

    A linear is called, or, as in Mamba's ``dt_proj``, its weight is multiplied from the left.

    Args:
        block: A decoder block.
        listener: Is told of each use.
    """

    def __init__(self, block: nn.Module, listener: Callable[[LinearCall], None]) -> None:
        self.linears = compressible(block)
        self.listener = listener
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._products = _LeftProducts({m.weight: n for n, m in self.linears.items()}, listener)

    def __enter__(self) -> "LinearCalls":
        """Start listening."""
        for name, linear in self.linears.items():
            self._hooks.append(linear.register_forward_hook(self._hook(name)))
        self._products.__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening."""
        self._products.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self.linears.clear()  # the block goes when its walker lets go of it
        self._products.names.clear()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def listen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.listener(LinearCall(name, inputs[0], output, -1))

        return listen


class _LeftProducts(TorchFunctionMode):
    """Sees ``weight @ x``."""

    def __init__(self, names: dict[Tensor, str], listener: Callable[[LinearCall], None]) -> None:
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
