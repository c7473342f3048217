"""Truncated SVD: the best matrix of a given rank, for the weight or for the layer's outputs."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

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
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.numerics.low_rank import output_factors, svd_cubes, weight_factors

STORED_BITS = 16  # the factors are stored in bfloat16


@dataclass(frozen=True)
class SVD(Method):
    """Two thin factors in bfloat16.

    Exactly one of ``rank``, ``keep`` and ``bits`` is given; a budget that would pay for more than
    the full rank gives the full rank.

    Attributes:
        rank: Number of singular triplets.
        keep: Parameters of the factors over parameters of the matrix, above 0 to 1.
        bits: True bits per weight.
        whiten: Minimise the error of the layer's outputs on the calibration inputs instead of the
            error of the weights; needs statistics.
    """

    uses_statistics: ClassVar[bool] = True

    rank: int | None = None
    keep: float | None = None
    bits: float | None = None
    whiten: bool = False

    @property
    def need(self) -> Need:
        """Statistics are needed to ``whiten`` alone."""
        return "needed" if self.whiten else "not used"

    def __post_init__(self) -> None:
        given = {"rank": self.rank, "keep": self.keep, "bits": self.bits}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"{given}: give exactly one of them")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be positive")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: allowed are above 0 to 1")
        if self.bits is not None and not self.bits > 0:
            raise ValueError(f"bits={self.bits}: must be positive")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> LowRankLinear:
        """Factorize ``weight [out, in]`` into ``A = U √Σ`` and ``B = √Σ Vᵀ``; no seed is used.

        With ``whiten``, ``U`` holds the principal directions of the layer's outputs, and ``Ŵ = U Uᵀ
        W``: no other matrix of this rank has a smaller ``tr(E H Eᵀ)``. No inverse is taken, so a
        singular ``H`` does no harm.

        Raises:
            ValueError: A weight that is no finite float matrix; a budget below rank 1, a rank above
                the full one; statistics missing (``whiten``) or of another size.

        Source: Eckart-Young; for ``whiten`` arXiv 2403.07378, whose ``B`` is ``√Σ Vᵀ L⁻¹``: the
        same matrix where that inverse exists.
        """
        del seed
        weight = checked_weight(weight)
        rank = self.rank_of(*weight.shape)
        if self.whiten:
            moment = checked_statistics(statistics, weight).second_moment
            return LowRankLinear.from_factors(*output_factors(weight, moment, rank))
        return LowRankLinear.from_factors(*weight_factors(weight, rank))

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the bits of rank 1."""
        out_features, in_features = shape
        return STORED_BITS * (out_features + in_features) / (out_features * in_features)

    def rank_of(self, out_features: int, in_features: int) -> int:
        """Return the rank that the budget pays for."""
        if self.rank is not None:
            return self.rank
        # Fractions: a float quotient just below a whole number would cost a rank.
        per_weight = (
            Fraction(str(self.keep))
            if self.keep is not None
            else Fraction(str(self.bits)) / STORED_BITS
        )
        rank = int(per_weight * out_features * in_features / (out_features + in_features))
        if rank < 1:
            name, value = ("keep", self.keep) if self.keep is not None else ("bits", self.bits)
            share = (out_features + in_features) / (out_features * in_features)
            least = share if name == "keep" else share * STORED_BITS
            raise ValueError(
                f"{name}={value}: rank 1 of shape [{out_features}, {in_features}] needs at least "
                f"{math.ceil(least * 1e4) / 1e4:.4f}"
            )
        return min(rank, out_features, in_features)

    def empty_layer(self, shape: Shape) -> LowRankLinear:
        """Return factors of the rank that the budget pays for."""
        rank = min(self.rank_of(*shape), *shape)
        return LowRankLinear.empty(shape, rank=rank)

    def work(self, shape: Shape) -> Work:
        """Return the work of the decomposition, and of the outputs' directions."""
        o, n = shape
        whitening = Work(fp32_flops=n**3 / 3 + 4.0 * o * n * n) if self.whiten else Work()
        return whitening + Work(svd_cubes=svd_cubes(o, n), bytes_moved=60.0 * o * n)

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the matrix, of its small square ones, and of the second moment."""
        moment = 3 * shape.in_features**2 if self.whiten else 0
        return 4 * (4 * shape.num_weights + 6 * min(shape) ** 2 + moment)
