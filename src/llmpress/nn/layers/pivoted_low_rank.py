"""A weight of low rank stored without redundancy: some of its rows, and the others from them.

Two factors of rank r hold ``r²`` numbers more than a matrix of rank r has degrees of freedom. Here
``B`` are r rows of ``Ŵ`` as they are and ``A B`` the others, so that ``Ŵ = [B; A B][place]``.

Source: pivoting factorization (PIFA), arXiv 2501.19090.
"""

import torch
from scipy.linalg import qr, solve_triangular
from torch import Tensor
from torch.nn import functional

from llmpress.nn.kernels.cpu import dense_matmul
from llmpress.nn.layers.base import frozen
from llmpress.nn.layers.blocked import linear
from llmpress.nn.layers.low_rank import LowRankLinear


class PivotedLowRankLinear(LowRankLinear):
    """``z = x Bᵀ`` are ``rank`` of the outputs; the others are ``z Aᵀ``.

    ``A [out - rank, rank]``, ``B [rank, in]``, and ``place [out]``: where each output stands among
    those that ``B`` gives and then those that ``A`` gives.

    Args:
        rank: Rows that are stored, fewer than there are.
        dtype: Stored dtype of ``A`` and ``B``.
    """

    kind = "pivoted_low_rank"

    place: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        dtype: str = "bfloat16",
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, rank=rank, dtype=dtype, bias=bias)
        stored = getattr(torch, dtype)
        self.A = frozen(torch.empty(out_features - rank, rank, dtype=stored))
        narrow = torch.int16 if out_features <= 1 << 15 else torch.int32
        self.register_buffer("place", torch.empty(out_features, dtype=narrow))

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, dtype: str = "bfloat16") -> "PivotedLowRankLinear":
        """Store the product of ``A [out, rank]`` and ``B [rank, in]``.

        Rows are chosen by QR with column pivoting of ``Aᵀ``, which keeps the entries of the stored
        ``A`` small.

        Raises:
            ValueError: ``A`` has not the rank it should have.
        """
        layer = cls(B.shape[1], A.shape[0], rank=A.shape[1], dtype=dtype)
        rank = layer.rank
        _, R, order = qr(A.detach().double().cpu().numpy().T, mode="economic", pivoting=True)
        if abs(R[rank - 1, rank - 1]) <= 1e-12 * abs(R[0, 0]):
            raise ValueError(f"factors of rank {rank} span fewer directions")
        others = torch.from_numpy(solve_triangular(R[:, :rank], R[:, rank:])).t()
        rows = torch.from_numpy(order).to(A.device)
        layer.A.data = others.to(A.device, layer.A.dtype).contiguous()
        layer.B.data = (A.double()[rows[:rank]] @ B.double()).to(layer.B.dtype).contiguous()
        layer.place = rows.argsort().to(layer.place.dtype)
        return layer

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return fp32 ``[out, rank]``, of which ``rank`` rows are unit vectors, and ``B``."""
        return self._left().float(), self.B.float()

    def _left(self) -> Tensor:
        unit = torch.eye(self.rank, dtype=self.A.dtype, device=self.A.device)
        return torch.cat([unit, self.A])[self.place.long()]

    def dequantize(self) -> Tensor:
        """Return ``Ŵ`` as fp32 ``[out, in]``."""
        B = self.B.float()
        return torch.cat([B, self.A.float() @ B])[self.place.long()]

    def by_factors(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, without forming the dense weight.

        Either outputs or the rows of the left factor are put in their places: whichever is less.
        """
        A, B = self._kept_factors(x)
        z = linear(x, B)
        if z.numel() >= self.rank**2:
            return functional.linear(z, self._left().to(z.dtype))
        y = torch.cat([z, linear(z, A)], dim=-1)
        return y.gather(-1, self.place.long().expand_as(y))  # half the time of an index, on a CPU

    def of_few_rows(self, rows: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[M, out]``, with the library compiled for this CPU."""
        z = dense_matmul(rows, self.B)
        y = torch.cat([z, dense_matmul(z, self.A)], dim=-1)
        return y.gather(-1, self.place.long().expand_as(y))
