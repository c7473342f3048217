"""BitDelta: the sign of every entry and one scale for the whole matrix."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llmpress.methods.base import (
    InputStatistics,
    Method,
    Need,
    Shape,
    Work,
    checked_statistics,
    checked_weight,
)
from llmpress.nn.layers.sign import SignLinear


@dataclass(frozen=True)
class BitDelta(Method):
    """One bit per weight.

    Attributes:
        scale: ``mean`` takes ``mean|Δ|``, the scale nearest to the weights; ``output`` the one with
            the least error of the layer's outputs on the calibration inputs, and needs statistics.
    """

    uses_statistics: ClassVar[bool] = True

    scale: Literal["mean", "output"] = "output"

    @property
    def need(self) -> Need:
        """Statistics are needed for ``output`` alone."""
        return "needed" if self.scale == "output" else "not used"

    def __post_init__(self) -> None:
        if self.scale not in ("mean", "output"):
            raise ValueError(f"scale={self.scale!r}: allowed are 'mean' and 'output'")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> SignLinear:
        """Compress ``weight [out, in]``; the seed is not used. Zero counts as positive.

        Raises:
            ValueError: A weight that is no finite float matrix; statistics missing (``output``) or
                of another size.

        Source: arXiv 2402.10193, equations 2 and 3. Deviation: the authors distil all scales end to
        end; ``output`` solves each layer's own least squares instead, in closed form.
        """
        del seed
        weight = checked_weight(weight)
        positive = weight >= 0
        scale = weight.abs().mean()
        if self.scale == "output":
            moment = checked_statistics(statistics, weight).second_moment
            scale = _output_scale(weight, positive, moment, otherwise=scale)
        return SignLinear.from_signs(positive, scale)

    def empty_layer(self, shape: Shape) -> SignLinear:
        """Return signs of this shape."""
        return SignLinear.empty(shape)

    def work(self, shape: Shape) -> Work:
        """Return the work of packing signs, and of the outputs' products."""
        o, n = shape
        flops = 2.0 * o * n * n if self.scale == "output" else 0.0
        return Work(fp64_flops=flops, bytes_moved=330.0 * o * n + 16.0 * n * n)

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the matrix and its signs, in fp64 for the outputs' products."""
        o, n = shape
        output = 8 * (3 * o * n + n * n) if self.scale == "output" else 0
        return 14 * o * n + max(output, 40 * o * n)


def _output_scale(weight: Tensor, positive: Tensor, moment: Tensor, otherwise: Tensor) -> Tensor:
    """Return ``argmin_a tr((a S - Δ) H (a S - Δ)ᵀ) = tr(S H Δᵀ) / tr(S H Sᵀ)``, ``S = ±1``.

    ``otherwise`` is returned where no input tells one scale from another (``S H Sᵀ = 0``).
    """
    signs = positive.double() * 2 - 1
    projected = signs @ moment.double()  # [out, in]
    denominator = (projected * signs).sum()
    if float(denominator) <= 0:
        return otherwise
    return (projected * weight.double()).sum() / denominator
