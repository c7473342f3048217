"""A weight stored as the product of two thin matrices: ``W ≈ A B``."""

from typing import Any

import torch
from torch import Tensor

from llmpress.nn.kernels.cpu import MOST_ROWS, low_rank_matmul
from llmpress.nn.layers.base import CompressedLinear, as_rows, frozen, rank_allocation
from llmpress.nn.layers.blocked import linear
from llmpress.nn.layers.dense_store import DENSE

SMALL_SAVING = 2**19
"""Weights: a CPU multiplies by so many more in about the time that a second product takes to begin
(AMD EPYC, 2 threads)."""


class LowRankLinear(CompressedLinear):
    """Two plain linears in a row, ``y = (x Bᵀ) Aᵀ``, with ``A [out, rank]`` and ``B [rank, in]``.

    Args:
        rank: Width between the two factors.
        dtype: Stored dtype of the factors.
    """

    kind = "low_rank"
    has_compiled = True
    trainable = ("A", "B")
    rebuilt_in_training = False
    has_factors = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        dtype: str = "bfloat16",
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank={rank}: allowed are 1 to {min(in_features, out_features)} "
                f"for shape [{out_features}, {in_features}]"
            )
        self.rank = rank
        self.dtype_name = dtype
        stored = getattr(torch, dtype)
        self.A = frozen(torch.empty(out_features, rank, dtype=stored))
        self.B = frozen(torch.empty(rank, in_features, dtype=stored))

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, dtype: str = "bfloat16") -> "LowRankLinear":
        """Store ``A [out, rank]`` and ``B [rank, in]`` in ``dtype``."""
        layer = cls(B.shape[1], A.shape[0], rank=A.shape[1], dtype=dtype)
        layer.A.data = A.to(layer.A.dtype).contiguous()
        layer.B.data = B.to(layer.B.dtype).contiguous()
        return layer

    def spec(self) -> dict[str, Any]:
        """Return rank and stored dtype."""
        return {"rank": self.rank, "dtype": self.dtype_name}

    def allocation(self) -> dict[str, float]:
        """Return the rank."""
        return rank_allocation(self.rank, self)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return fp32 ``[out, rank]`` and ``[rank, in]`` whose product is the weight."""
        return self.A.float(), self.B.float()

    def dequantize(self) -> Tensor:
        """Return the product of the factors as fp32 ``[out, in]``."""
        left, right = self.factors()
        return left @ right

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, by the factors.

        On a CPU by the dense weight, where that is kept and the factors would take longer.
        """
        if self.computes_packed(x) and x.numel() <= MOST_ROWS * self.in_features:
            return self.of_few_rows(as_rows(x)).view(*x.shape[:-1], self.out_features)
        saved = self.num_weights - self.A.numel() - self.B.numel()
        if saved < SMALL_SAVING:
            unpack, numel = self._unpack_weights, self.num_weights
            if (dense := self.kept(x, DENSE, self.changing(), unpack, numel)) is not None:
                return linear(x, *dense)
        return self.by_factors(x)

    def rebuilt_product(self, x: Tensor) -> Tensor:
        """Return `product`: it forms no dense weight."""
        return self.product(x)

    def by_factors(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, without forming the dense weight."""
        A, B = self._kept_factors(x)
        return linear(linear(x, B), A)

    def of_few_rows(self, rows: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[M, out]``, with the library compiled for this CPU."""
        return low_rank_matmul(rows, self.A, self.B)

    def _kept_factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return ``A`` and ``B`` for `linear`."""
        numel = self.A.numel() + self.B.numel()
        kept = self.kept(x, "factors", self.changing(), self._factors_as, numel)
        return self._factors_as(x.dtype) if kept is None else kept

    def _factors_as(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.A.to(dtype), self.B.to(dtype)
