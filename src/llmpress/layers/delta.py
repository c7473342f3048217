"""A base layer and the compressed delta of one fine-tuned model on top of it."""

from torch import Tensor, nn

from llmpress.layers.base import CompressedLinear


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
        out: Tensor = self.base(x) + self.delta(x)
        return out
