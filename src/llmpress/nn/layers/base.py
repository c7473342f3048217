"""What every compressed linear layer has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llmpress.nn.kernels.delta_matmul import RowOwners
from llmpress.nn.kernels.dispatch import uses_compiled
from llmpress.nn.layers.blocked import in_blocks, linear
from llmpress.nn.layers.dense_store import DENSE
from llmpress.nn.layers.rebuilt import rebuilt_product

if TYPE_CHECKING:
    from llmpress.nn.layers.dense_store import DenseStore

SumByRow = Callable[[Tensor, Tensor, RowOwners], Tensor]
"""``y [rows, out]``, ``x [rows, in]``, whose the rows are -> the sum of ``y`` with what each row's
own layer makes of ``x``."""


KINDS: dict[str, type["CompressedLinear"]] = {}
"""Every layer by the name it has in artifacts; a class enters itself."""


class CompressedLinear(nn.Module, ABC):
    """A linear layer ``y = x Wᵀ + b`` that stores something smaller than ``W [out, in]``.

    A subclass registers its tensors under fixed names as buffers (integers) or parameters (floats
    that may be trained) of shapes that follow from its constructor arguments alone, so that an
    empty twin can be built on the meta device and filled from a file. ``state_dict()`` is exactly
    what is stored.

    Attributes:
        kind: The layer's name in an artifact.
        trainable: Names of the float tensors that finetuning may change.
        rebuilt_in_training: Whether training needs more than is stored, unpacked for each use.
        has_compiled: Whether the library for CPUs multiplies by what is stored.
        has_factors: Whether the weight is a product of two `factors`.
        notes: What the method has to say of how it went, for the record: numbers by name. Not
            stored with the layer.
        dense_store: On a CPU, keeps unpacked weights between calls; without one, and on a GPU,
            they are unpacked for each.
        rebuilding: Whether the backward pass unpacks weights anew instead of keeping them.
    """

    kind: ClassVar[str]
    trainable: tuple[str, ...] = ()
    rebuilt_in_training: ClassVar[bool] = True
    has_compiled: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False

    bias: nn.Parameter | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"shape [out={out_features}, in={in_features}] has an empty side")
        self.in_features = in_features
        self.out_features = out_features
        self.notes: dict[str, float] = {}
        self.dense_store: DenseStore | None = None
        self.rebuilding = False
        self.bias = frozen(torch.empty(out_features)) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, int], **spec: Any) -> Self:
        """Build a layer for a weight of ``shape [out, in]`` on the meta device: its bytes alone."""
        with torch.device("meta"):
            return cls(shape[1], shape[0], **spec)

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return the constructor arguments that build an empty twin, without shape and bias."""

    def allocation(self) -> dict[str, float]:
        """Return what a method gave this layer, by the words that a chart says of it.

        A number's part is called by the number, `` at `` and what part: ``Rank at 8 bits``.
        """
        return {}

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight this layer stands for, fp32 ``[out, in]``."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return fp32 ``[out, rank]`` and ``[rank, in]`` whose product is the weight.

        Raises:
            TypeError: A layer that has none.
        """
        raise TypeError(f"{type(self).__name__} is no product of factors")

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, in the dtype of ``x [..., in]``."""
        (weight,) = self.unpacked(x)
        return linear(x, weight)

    def rebuilt_product(self, x: Tensor) -> Tensor:
        """Return the same, and keep nothing that is unpacked for the backward pass."""
        return rebuilt_product(self, x)

    def keep_unpacked(self, keep: bool) -> None:
        """Hold what does not train unpacked between calls (finetuning), or drop it again."""

    def sum_key(self) -> Hashable:
        """Return what layers have in common that `sum_by_row` takes together; None for none."""
        return None

    @classmethod
    def sum_by_row(cls, layers: Sequence[Self | None]) -> "SumByRow":
        """Return one operation that adds to each row the product of its own layer.

        Args:
            layers: One for each number of an owner, of one shape and one `sum_key`; None adds
                nothing.

        Raises:
            TypeError: There is no such operation for these layers.
        """
        del layers
        raise TypeError(f"{cls.__name__} has no kernel for rows of several layers")

    def unpacked(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what `product` multiplies ``x`` by, for `linear`: kept where there is a store."""
        found = self.kept(x, DENSE, self.changing(), self._unpack_weights, self._num_unpacked())
        return self._unpack_weights(product_dtype(x)) if found is None else found

    def computes_packed(self, x: Tensor) -> bool:
        """Whether to multiply ``x`` by what is stored, with the library compiled for this CPU.

        Only in models that were loaded to be used, and where no gradients are needed: what
        compresses and trains gives the same with the library and without.
        """
        return (
            self.has_compiled
            and self.dense_store is not None
            and uses_compiled(x)
            and not (torch.is_grad_enabled() and needs_gradient(x, self.changing()))
        )

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
        unpack: Callable[[torch.dtype], tuple[Tensor, ...]],
        numel: int,
    ) -> tuple[Tensor, ...] | None:
        """Return weights that are kept between calls, for `linear`; None where they cannot be.

        That is: on a GPU, where gradients are needed, while compiling, where there is no room, and
        where products come from what is stored.

        Args:
            x: What they will be multiplied with.
            form: The name of the form; a layer may keep several.
            changing: The tensors whose change makes them stale.
            unpack: Makes them in a dtype.
            numel: How many numbers of that dtype they take.
        """
        store = self.dense_store
        if (
            store is None
            or not x.is_cpu
            or (torch.is_grad_enabled() and needs_gradient(x, changing))
            or torch.compiler.is_compiling()
            or self.computes_packed(x)
        ):
            return None
        dtype = product_dtype(x)
        found = store.find(self, form, changing, dtype)
        if found is None and store.has_room(self, form, dtype.itemsize * numel):
            return store.make(self, form, changing, dtype, lambda: in_blocks(unpack(dtype)))
        return found

    def _unpack_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (self.dequantize().to(dtype),)

    def _num_unpacked(self) -> int:
        """Return how many numbers `_unpack_weights` makes."""
        return self.num_weights

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        y = self.rebuilt_product(x) if self.rebuilding else self.product(x)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

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

    def held_bytes(self) -> int:
        """Return the bytes of what is kept unpacked while the layer trains."""
        return 0

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


def rank_allocation(rank: int, layer: CompressedLinear) -> dict[str, float]:
    """Return the `allocation` of a layer that holds factors."""
    full = min(layer.in_features, layer.out_features)
    return {"Rank": rank, "Rank, % of the full rank": 100 * rank / full}


def own_parameters(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters without those of its submodules.

    `nn.Module.parameters` takes ten times as long.
    """
    return [tensor for tensor in module._parameters.values() if tensor is not None]


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product with ``x`` is computed in: its own, or that of autocast.

    Operations of our own are unknown to autocast.
    """
    kind = "cpu" if x.is_cpu else x.device.type  # the latter takes longer
    if not (x.is_cpu or torch.amp.is_autocast_available(kind)):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def as_rows(x: Tensor) -> Tensor:
    """Return ``x [..., in]`` as contiguous rows ``[M, in]``, in `product_dtype`."""
    return x.to(product_dtype(x)).reshape(-1, x.shape[-1]).contiguous()


def needs_gradient(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a product of ``x`` with these weights has a gradient, where gradients are enabled."""
    return x.requires_grad or any(weight.requires_grad for weight in weights)


def rounded_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` as it is stored in ``dtype``; int8 is rounded to nearest and clamped."""
    if dtype == torch.int8:
        return tensor.round().clamp(-127, 127).to(dtype)
    return tensor.to(dtype)


def frozen(tensor: Tensor) -> nn.Parameter:
    """Wrap a float tensor as a parameter that does not train until asked to."""
    return nn.Parameter(tensor, requires_grad=False)
