"""A base layer and the compressed delta of one fine-tuned model on top of it."""

from torch import Tensor, nn
from torch.nn import functional

from llmpress.layers.base import CompressedLinear, ImpliedWeight


class AdaptedLinear(nn.Module):
    """``y = base(x) + delta(x)``: the base stays as it is, the delta stays compressed.

    Args:
        base: Any module that maps ``[..., in]`` to ``[..., out]``.
        delta: The compressed ``W_finetuned - W_base``.
    """

    def __init__(self, base: nn.Module, delta: CompressedLinear) -> None:
        super().__init__()
        self.base = base
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        return self.delta.added_to(self.base(x), x)

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

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.base, CompressedLinear):
            return self.base.product(x) + self.delta.product(x)
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.base.weight) + self.delta.product(x)
        raise TypeError(f"a delta lies on a {type(self.base).__name__}, which has no weight")
