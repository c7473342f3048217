"""A compression method of one's own: ternary weights, one scale per row.

python examples/05_own_method.py
"""

# --8<-- [start:method]
from dataclasses import dataclass

import torch
from torch import Tensor

from llmpress.methods.base import InputStatistics, Method, checked_weight
from llmpress.nn.layers.quantized import QuantizedLinear


@dataclass(frozen=True)
class Ternary(Method):
    """Every weight becomes ``-s``, ``0`` or ``s``, with one ``s`` per row.

    Attributes:
        threshold: Weights below this multiple of their row's mean ``|w|`` become zero.
    """

    threshold: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 10:
            raise ValueError(f"threshold={self.threshold}: allowed are 0 to below 10")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> QuantizedLinear:
        """Compress ``weight [out, in]``; statistics and seed are not used."""
        del statistics, seed
        weight = checked_weight(weight)  # fp32; raises ValueError for NaN, Inf or another shape
        size = weight.abs()
        kept = size > self.threshold * size.mean(dim=1, keepdim=True)
        count = kept.sum(dim=1, keepdim=True).clamp(min=1)
        scales = (size * kept).sum(dim=1, keepdim=True) / count  # [out, 1], the best s of each row
        codes = torch.sign(weight) * kept + 1  # 0, 1 or 2 stand for -s, 0 and s
        zero_points = torch.ones_like(scales, dtype=torch.int32)
        return QuantizedLinear.from_codes(
            codes.to(torch.int32), scales, zero_points, num_bits=2, group_size=weight.shape[1]
        )


# --8<-- [end:method]
def main() -> None:
    """Call the method as the engine does: a weight in, a layer out."""
    weight = torch.randn(256, 512)
    layer = Ternary(threshold=0.7).compress(weight)
    error = (layer.dequantize() - weight).square().sum() / weight.square().sum()
    print(layer)
    print(f"{layer.stored_bits() / weight.numel():.3f} bits per weight, squared error {error:.3f}")
    torch.testing.assert_close(layer(torch.eye(512)), layer.dequantize().T)


if __name__ == "__main__":
    main()
