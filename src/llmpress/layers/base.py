"""What every compressed linear layer has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
        changing = self.changing()
        store = None if torch.compiler.is_compiling() else self.dense_store
        if (
            store is None
            or changing[0].device.type != "cpu"
            or (torch.is_grad_enabled() and any(t.requires_grad for t in changing))
        ):
            return self._unpack_weights(dtype)
        found = store.find(self, changing, dtype)
        if found is None:
            return store.make(self, changing, dtype, partial(self._unpack_weights, dtype))
        return found

    def changing(self) -> list[Tensor]:
        """Return the floats: what tells, at every call, whether the layer is another one.

        Codes do not change without them, but by assignment, which is noticed where it happens. To
        look at all tensors would take as long as a small product: none is in a cache by then.
        """
        return own_parameters(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what was unpacked from an earlier tensor is let go."""
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and (store := self.__dict__.get("dense_store")) is not None:
            store.drop(self)

    def kept(
        self,
        x: Tensor,
        form: str,
        changing: Sequence[Tensor],
        build: Callable[[], tuple[Tensor, ...]],
        nbytes: int,
    ) -> tuple[Tensor, ...] | None:
        """Return weights in a form that is only worth making when it is kept.

        None on a GPU, with gradients, while compiling, and where there is no room.

        Args:
            x: What they will be multiplied with.
            form: The name of the form.
            changing: The tensors whose change makes them stale.
            build: Makes them.
            nbytes: What they take.
        """
        store = self.dense_store
        if (
            store is None
            or torch.is_grad_enabled()
            or not x.is_cpu
            or torch.compiler.is_compiling()
        ):
            return None
        found = store.find(self, changing, x.dtype, form)
        if found is None and store.has_room(self, form, nbytes):
            return store.make(self, changing, x.dtype, build, form)
        return found

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


def own_parameters(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters without those of its submodules.

    `nn.Module.parameters` takes ten times as long.
    """
    return [tensor for tensor in module._parameters.values() if tensor is not None]


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
