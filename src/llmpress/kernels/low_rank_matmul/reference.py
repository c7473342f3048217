"""``y = (x Bᵀ) Aᵀ`` as a formula, with ``A [out, rank]`` and ``B [rank, in]``."""

from torch import Tensor


def low_rank_matmul_reference(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``[M, out]`` in the dtype of ``x [M, in]``; computed in fp32."""
    return (x.float() @ B.float().t() @ A.float().t()).to(x.dtype)
