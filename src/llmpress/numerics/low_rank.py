"""The best factors of a given rank: of a weight, and of a layer's outputs on some text.

Dimensions: ``W [out, in]`` a weight, ``H = E[x xᵀ] [in, in]`` the second moment of its input, ``G``
the diagonal of how much an error of each output counts.
"""

import torch
from torch import Tensor

from llmpress.numerics.linalg import truncated_svd


class OutputDirections:
    """Orthonormal directions of weighted outputs ``G^½ W x``, by falling energy.

    They are the eigenvectors of ``G^½ W H Wᵀ G^½``, found from the smaller side: where the outputs
    are more than the inputs, from those of ``Lᵀ Wᵀ G W L`` with ``L Lᵀ = H``.

    Args:
        weight: ``W [out, in]``.
        second_moment: ``H [in, in]``.
        importance: Diagonal of G, positive ``[out]``; ones if None.

    Attributes:
        energy: Mean square of the outputs along each, fp64 ``[min(out, in)]``.
    """

    def __init__(
        self, weight: Tensor, second_moment: Tensor, importance: Tensor | None = None
    ) -> None:
        moment, self._outputs = _smaller_moment(weight, second_moment, importance)
        ascending, self._vectors = torch.linalg.eigh(moment)
        self.energy: Tensor = ascending.flip(0).clamp(min=0)

    def leading(self, rank: int) -> Tensor:
        """Return the first ``rank`` of them as columns, fp64 ``[out, rank]``."""
        vectors: Tensor = self._vectors[:, self._vectors.shape[1] - rank :].flip(1)
        if self._outputs is not None:
            vectors = torch.linalg.qr(self._outputs @ vectors).Q  # also where energy is 0
        return vectors


def output_energy(
    weight: Tensor, second_moment: Tensor, importance: Tensor | None = None
) -> Tensor:
    """Return the energy of `OutputDirections` alone, fp64 ``[min(out, in)]``, in half the time."""
    moment, _ = _smaller_moment(weight, second_moment, importance)
    energy: Tensor = torch.linalg.eigvalsh(moment)
    return energy.flip(0).clamp(min=0)


def _smaller_moment(
    weight: Tensor, second_moment: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``G^½ W H Wᵀ G^½``, or ``FᵀF`` and ``F [out, in]`` with ``F Fᵀ`` equal to it."""
    W = weight.double()
    if importance is not None:
        W = W * importance.double().sqrt().unsqueeze(1)
    H = second_moment.double()
    if W.shape[0] <= W.shape[1]:
        return W @ H @ W.t(), None
    values, basis = torch.linalg.eigh(H)
    outputs = W @ (basis * values.clamp(min=0).sqrt())
    return outputs.t() @ outputs, outputs


def output_factors(
    weight: Tensor,
    second_moment: Tensor,
    rank: int,
    importance: Tensor | None = None,
    *,
    balanced: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the factors ``A [out, rank]``, ``B [rank, in]`` of least ``E Σ_o g_o (y_o - ŷ_o)²``.

    The optimum projects the weighted outputs onto their leading directions ``U_r``:
    ``A = G^-½ U_r``, ``B = U_rᵀ G^½ W``. Without weights it equals whitening by any ``S`` with
    ``S Sᵀ = H`` followed by a truncated SVD, but needs no inverse of ``S`` and so no damping when
    ``H`` is singular.

    Args:
        weight: ``W [out, in]``.
        second_moment: ``H [in, in]``.
        rank: Number of directions kept.
        importance: Diagonal of G, positive ``[out]``; ones if None.
        balanced: Scale columns of A and rows of B to equal norms.

    Raises:
        ValueError: A rank outside the matrix.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank}: allowed are 1 to {min(weight.shape)}")
    U = OutputDirections(weight, second_moment, importance).leading(rank)
    root = torch.ones_like(U[:, 0]) if importance is None else importance.double().sqrt()
    B = (U * root.unsqueeze(1)).t() @ weight.double()
    A = U / root.unsqueeze(1)
    if not balanced:
        return A.float(), B.float()
    scale = (B.norm(dim=1).clamp(min=1e-30) / A.norm(dim=0)).sqrt()
    return (A * scale).float(), (B / scale.unsqueeze(1)).float()


def weight_factors(weight: Tensor, rank: int, *, balanced: bool = True) -> tuple[Tensor, Tensor]:
    """Return the factors of least ``‖W - A B‖``: the truncated SVD.

    Args:
        weight: ``W [out, in]``.
        rank: Number of singular triplets kept.
        balanced: ``A = U √Σ`` and ``B = √Σ Vᵀ``; otherwise all of Σ is in B.
    """
    left, values, right = truncated_svd(weight, rank)
    if not balanced:
        return left, values[:, None] * right
    half = values.sqrt()
    return left * half, half[:, None] * right


def svd_cubes(rows: int, columns: int) -> float:
    """Return the work of an SVD, ``m · n · min(m, n)``: half as much again for wide matrices."""
    wide = 1.5 if columns > rows else 1.0
    return wide * rows * columns * min(rows, columns)
