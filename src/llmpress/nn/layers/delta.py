"""A base layer and the compressed delta of one fine-tuned model on top of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmpress.nn.layers.base import CompressedLinear, ImpliedWeight, own_parameters
from llmpress.nn.layers.blocked import linear


class AdaptedLinear(nn.Module):
    """``y = base(x) + delta(x)``: the base stays as it is, the delta stays compressed.

    Args:
        base: Any module that maps ``[..., in]`` to ``[..., out]``.
        delta: The compressed ``W_finetuned - W_base``.

    Attributes:
        keeps_sum: On a CPU, multiply by the sum of both weights, kept in the delta's dense store as
            long as there is room: one product instead of three. For a base with one delta; the sums
            of many would fill the store.
    """

    def __init__(self, base: nn.Module, delta: CompressedLinear) -> None:
        super().__init__()
        self.base = base
        self.delta = delta
        self.keeps_sum = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        weight = self._kept_sum(x)
        if weight is None:
            return self.delta.added_to(self.base(x), x)
        y, bias = linear(x, weight), self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def dequantize(self) -> Tensor:
        """Return the sum of both weights, fp32 ``[out, in]``.

        Raises:
            TypeError: The base is no linear layer.
        """
        return self._base_weight() + self.delta.dequantize()

    @property
    def weight(self) -> ImpliedWeight:
        """The sum of both weights, for a module that multiplies by it without calling this layer.

        Raises:
            TypeError: The base is no linear layer.
        """
        return ImpliedWeight(self._product)

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return getattr(self.base, "bias", None)

    def _kept_sum(self, x: Tensor) -> Tensor | None:
        base, delta = self.base, self.delta
        if (
            not self.keeps_sum
            or delta.computes_packed(x)
            or delta.bias is not None
            or not isinstance(base, (nn.Linear, CompressedLinear))
        ):
            return None
        changing = own_parameters(base) + delta.changing()
        found = delta.kept(x, "sum", changing, self._sum_as, delta.num_weights)
        return None if found is None else found[0]

    def _sum_as(self, dtype: torch.dtype) -> tuple[Tensor]:
        return (self.dequantize().to(dtype),)

    def _base_weight(self) -> Tensor:
        if isinstance(self.base, CompressedLinear):
            return self.base.dequantize()
        if isinstance(self.base, nn.Linear):
            return self.base.weight.float()
        raise TypeError(f"a delta lies on a {type(self.base).__name__}, which has no weight")

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.base, CompressedLinear):
            return self.base.product(x) + self.delta.product(x)
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.base.weight) + self.delta.product(x)
        raise TypeError(f"a delta lies on a {type(self.base).__name__}, which has no weight")
