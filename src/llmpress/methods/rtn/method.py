"""Round to nearest: every weight to the nearest point of its group's grid, no data needed."""

from dataclasses import dataclass

from torch import Tensor

from llmpress.methods.base import InputStatistics, Method, Shape, checked_weight
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.numerics.grids import fit_grid, nearest_codes


@dataclass(frozen=True)
class RTN(Method):
    """Asymmetric min/max quantization, group by group.

    Attributes:
        num_bits: Bits of one code, 1 to 8. Zero is always on the grid, so one bit means
            ``{0, max}`` or ``{min, 0}``.
        group_size: Consecutive input channels that share a scale and a zero point; cut to the
            number of input channels where it is larger.
    """

    num_bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.num_bits <= 8:
            raise ValueError(f"num_bits={self.num_bits}: allowed are 1 to 8")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be positive")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> QuantizedLinear:
        """Quantize ``weight [out, in]``; statistics and seed are not used.

        Raises:
            ValueError: A weight that is no finite float matrix or too large for fp16 scales.
        """
        del statistics, seed
        weight = checked_weight(weight)
        group_size = min(self.group_size, weight.shape[1])
        grid = fit_grid(weight, self.num_bits, group_size)
        codes = nearest_codes(weight, grid, self.num_bits, group_size)
        return QuantizedLinear.from_codes(
            codes, grid.scales, grid.zero_points, self.num_bits, group_size
        )

    def empty_layer(self, shape: Shape) -> QuantizedLinear:
        """Return codes and grids of this shape."""
        return QuantizedLinear.empty(
            shape,
            num_bits=self.num_bits,
            group_size=min(self.group_size, shape.in_features),
        )
