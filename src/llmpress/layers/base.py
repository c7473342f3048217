"""What every compressed linear layer has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from llmpress.layers.dense_store import DenseStore

Spec = Mapping[str, Any]
"""Constructor arguments of a layer, JSON-representable: what shapes and widths its tensors have."""


class CompressedLinear(nn.Module, ABC):
    """A linear layer ``y = x Wᵀ + b`` that stores something smaller than ``W [out, in]``.

    A subclass registers its tensors under fixed names as buffers (integers) or parameters (floats
    that may be trained) of shapes that follow from its constructor arguments alone, so that an
    empty twin can be built on the meta device and filled from a file. ``state_dict()`` is exactly
    what is stored.

    Attributes:
        kind: The layer's name in an artifact.
        trainable: Names of the float tensors that finetuning may change.
        notes: What the method has to say of how it went, for the record: numbers by name. Not
            stored with the layer.
        dense_store: On a CPU, keeps unpacked weights between calls; without one, and on a GPU,
            they are unpacked for each.
    """

    kind: ClassVar[str]
    trainable: tuple[str, ...] = ()

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"shape [out={out_features}, in={in_features}] has an empty side")
        self.in_features = in_features
        self.out_features = out_features
        self.notes: dict[str, float] = {}
        self.dense_store: DenseStore | None = None
        self.bias = frozen(torch.empty(out_features)) if bias else None

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return the constructor arguments that build an empty twin, without shape and bias."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight this layer stands for, fp32 ``[out, in]``."""

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, in the dtype of ``x [..., in]``."""
        (weight,) = self.unpacked(x.dtype)
        return functional.linear(x, weight)

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the dense tensors that `product` multiplies by, kept where there is a store."""
        stored = self.stored()
        store = None if torch.compiler.is_compiling() else self.dense_store
        if (
            store is None
            or stored[0].device.type != "cpu"
            or (torch.is_grad_enabled() and any(t.requires_grad for t in stored))
        ):
            return self._unpack_weights(dtype)
        return store.weights(self, stored, dtype, lambda: self._unpack_weights(dtype))

    def stored(self) -> list[Tensor]:
        """Return the stored tensors themselves."""
        return own_tensors(self)

    def store_for(self, x: Tensor, form: str, nbytes: int) -> "DenseStore | None":
        """Return the store, where it keeps weights of this layer for inputs like ``x``, or would.

        None on a GPU, with gradients, while compiling, and where there is no room.

        Args:
            x: Inputs.
            form: The form the weights are needed in, as in `DenseStore.weights`.
            nbytes: What they would take.
        """
        store = self.dense_store
        if (
            store is None
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not store.keeps(self, form, nbytes)
        ):
            return None
        return store

    def _unpack_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self.dequantize().to(dtype).contiguous(),)  # transposed, products are slower

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + self(x)``: for a delta on the result ``y [..., out]`` of its base."""
        added: Tensor = self(x)
        return y + added

    @property
    def weight(self) -> "ImpliedWeight | Tensor":
        """The weight, for a module that multiplies by it without calling this layer.

        torch.compile cannot follow products of anything but tensors: it gets the dense weight, in
        the dtype of the bias.
        """
        if torch.compiler.is_compiling():
            dense = self.dequantize()
            return dense if self.bias is None else dense.to(self.bias.dtype)
        return ImpliedWeight(self.product)

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor by name."""
        return dict(self.state_dict())

    def stored_bits(self) -> int:
        """Return the size of all stored tensors in bits: their bytes on disk times eight."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def num_weights(self) -> int:
        """Number of weights this layer stands for."""
        return self.in_features * self.out_features

    def extra_repr(self) -> str:
        """Show shape, settings and true size."""
        bits = self.stored_bits() / self.num_weights
        settings = ", ".join(f"{k}={v}" for k, v in self.spec().items())
        return f"in={self.in_features}, out={self.out_features}, {settings}, bits/weight={bits:.3f}"


class ImpliedWeight:
    """A weight ``[out, in]`` that is never formed: ``weight @ x``, as Mamba's mixer calls for.

    Args:
        product: Maps ``x [..., in]`` to ``x Wᵀ``.
    """

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self._product = product

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply ``x [..., in, columns]`` from the left."""
        return self._product(x.transpose(-1, -2)).transpose(-1, -2)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers, without those of its submodules.

    Asked for at every call: `nn.Module.parameters` takes ten times as long.
    """
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]


def as_rows(x: Tensor) -> Tensor:
    """Return ``x [..., in]`` as contiguous rows ``[M, in]``, in the dtype of autocast.

    Operations of our own are unknown to autocast.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return x.reshape(-1, x.shape[-1]).contiguous()


def rounded_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` as it is stored in ``dtype``; int8 is rounded to nearest and clamped."""
    if dtype == torch.int8:
        return tensor.round().clamp(-127, 127).to(dtype)
    return tensor.to(dtype)


def frozen(tensor: Tensor) -> nn.Parameter:
    """Wrap a float tensor as a parameter that does not train until asked to."""
    return nn.Parameter(tensor, requires_grad=False)
