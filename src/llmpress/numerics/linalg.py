"""Linear algebra that methods share: factors of a second moment, truncated SVD, output error.

Dimensions: ``W [out, in]`` a weight, ``H = E[x xᵀ] [in, in]`` the second moment of its input.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmpress.nn.layers.blocked import matmul

MAX_DAMPENING = 1e4
PANEL_ROWS = 256
"""Rows of a symmetric product that are computed at a time, up to the diagonal's last one."""


class Damped(NamedTuple):
    """A factor and how much was added to the diagonal before it existed.

    Attributes:
        factor: Triangular ``[n, n]``, fp32.
        dampening: What was added, as a fraction of the mean diagonal entry.
        attempts: Number of factorizations that were tried; 1 where the first one held.
    """

    factor: Tensor
    dampening: float
    attempts: int


def with_positive_diagonal(second_moment: Tensor) -> Tensor:
    """Return a copy in which channels without input have the mean ``E[x²]`` of the others."""
    moment = second_moment.detach().float().clone()
    dead = moment.diagonal() <= 0
    live = moment.diagonal()[~dead]
    moment.diagonal()[dead] = live.mean() if live.numel() else 1.0
    return moment


def damped_cholesky(matrix: Tensor, dampening: float) -> Damped:
    """Return the lower Cholesky factor ``L`` of ``matrix + λ I = L Lᵀ``.

    ``λ`` is ``dampening`` times the mean of the diagonal. A factorization that breaks down is tried
    again with ten times the dampening (1e-6 after zero), and the result says so. Nothing else
    changes: it is the same algorithm with a stiffer matrix.

    Args:
        matrix: Symmetric positive semi-definite ``[n, n]``, fp32, finite.
        dampening: Fraction of the mean diagonal entry, not negative.

    Returns:
        The factor with the dampening it took.

    Raises:
        ValueError: A negative dampening, or a matrix that no dampening up to 1e4 makes definite.
    """
    if dampening < 0:
        raise ValueError(f"dampening={dampening}: must not be negative")
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        raise ValueError(f"matrix: the mean of its diagonal is {mean}, it must be positive")
    attempts = 0
    while dampening <= MAX_DAMPENING:
        attempts += 1
        damped = matrix.clone()
        damped.diagonal().add_(dampening * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return Damped(lower, dampening, attempts)
        dampening = max(1e-6, dampening * 10)
    raise ValueError(
        f"matrix of size {matrix.shape[0]}: not definite with {MAX_DAMPENING:g} times its mean "
        "diagonal added; the statistics are damaged"
    )


def damped_inverse_cholesky(matrix: Tensor, dampening: float) -> Damped:
    """Return the upper Cholesky factor ``C`` of the inverse: ``(matrix + λ I)⁻¹ = Cᵀ C``.

    With rows and columns reversed, the factorization is ``matrix + λ I = R Rᵀ``, ``R`` upper, and
    ``C = R⁻¹``: that never forms the inverse, which would square the condition number.

    Args:
        matrix: Symmetric positive semi-definite ``[n, n]``, fp32, finite.
        dampening: See `damped_cholesky`.

    Returns:
        The factor with the dampening it took.

    Raises:
        ValueError: See `damped_cholesky`.
    """
    lower, used, attempts = damped_cholesky(matrix.flip(0, 1), dampening)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Damped(factor, used, attempts)


def gram(x: Tensor) -> Tensor:
    """Return ``xᵀ x [n, n]`` of ``x [m, n]``: the lower triangle in panels, mirrored."""
    columns = x.t().contiguous()  # [n, m]
    n = len(columns)
    product = x.new_empty(n, n)
    for start in range(0, n, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, n)
        panel = matmul(columns[start:stop], columns[:stop].t())
        product[start:stop, :stop] = panel
        product[:start, start:stop] = panel[:, :start].t()
    return product


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triplets ``matrix ≈ U diag(σ) Vᵀ``.

    Each pair of vectors has its sign fixed (the largest entry of ``u`` by size is positive), so
    that two machines agree on it.

    Args:
        matrix: ``[m, n]``, finite.
        rank: 1 to ``min(m, n)``.

    Returns:
        ``U [m, rank]``, ``σ [rank]`` falling, ``Vᵀ [rank, n]``, fp32.

    Raises:
        ValueError: A rank outside the matrix.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank={rank}: allowed are 1 to {min(matrix.shape)}")
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))  # [1, rank]
    signs = torch.where(largest < 0, -1.0, 1.0)
    return left * signs, values, right * signs.T


def relative_output_error(weight: Tensor, approximation: Tensor, second_moment: Tensor) -> float:
    """Return ``tr(E H Eᵀ) / tr(W H Wᵀ)`` with ``E = W - Ŵ``: the error of the layer's outputs.

    Args:
        weight: ``W [out, in]``.
        approximation: ``Ŵ [out, in]``.
        second_moment: ``H [in, in]``.

    Returns:
        Mean squared error of ``W x`` over its mean square, without unit; 0 where both are zero.
    """
    weight = weight.float()
    error = weight - approximation.float()
    return _ratio(_energy(error, second_moment), _energy(weight, second_moment))


def _energy(matrix: Tensor, second_moment: Tensor) -> Tensor:
    """Return ``tr(M H Mᵀ)``: products in fp32, the sum in fp64."""
    return (matmul(matrix, second_moment.float()) * matrix).sum(dtype=torch.float64)


def relative_weight_error(weight: Tensor, approximation: Tensor) -> float:
    """Return ``‖W - Ŵ‖² / ‖W‖²``, without unit; 0 where both are zero."""
    error = weight.double() - approximation.double()
    return _ratio(error.square().sum(), weight.double().square().sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    part, whole = part.clamp(min=0), whole.clamp(min=0)
    if float(whole) == 0:
        return 0.0 if float(part) == 0 else float("inf")
    return float(part / whole)


def root_mean_square(values: Tensor) -> float:
    """Return the size of a tensor's entries, 1 for a tensor of zeros."""
    return float(values.detach().float().square().mean().sqrt()) or 1.0
