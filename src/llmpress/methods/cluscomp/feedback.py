"""Codes and codebook of a matrix chosen for its output: error feedback over vectors.

Minimised is ``Σ_o g_o (w_o - ŵ_o)ᵀ H (w_o - ŵ_o)`` over the rows ``w_o [in]`` of a weight, with
``H = E[x xᵀ]`` and the importance ``g_o`` of output ``o``. Vectors are consecutive outputs of one
input channel, so a whole input channel is rounded at once and its error goes into the channels to
come, as in GPTQ; entries are compared by ``Σ_j g_j (v_j - c_j)²``.

Dimensions: ``columns [in, G·d]`` the transposed weight, padded; ``codebook [K, d]``; ``codes
[in, G]``; ``importance [G·d]``.
"""

import numpy as np
import torch
from torch import Tensor

from llmpress.nn.kernels.kmeans.sums import ClusterSums
from llmpress.nn.layers.blocked import matmul

BLOCK_CHANNELS = 128


class Assignment:
    """Finds the nearest codebook entry of each vector of one input channel.

    ``argmin_c Σ g (v - c)² = argmin_c Σ g c²/2 - g v c``, one product of ``[g v, g]`` and
    ``[-c, c²/2]``.

    Args:
        codebook: ``[K, d]``.
        importance: Weight of each output's squared error, ``[G·d]``.
    """

    def __init__(self, codebook: Tensor, importance: Tensor) -> None:
        K, self.vector_size = codebook.shape
        self.importance = importance.view(-1, self.vector_size)  # [G, d]
        self.queries = torch.cat([self.importance, self.importance], dim=1)  # [G, 2 d]
        self.weighted = self.queries[:, : self.vector_size]
        self.table = torch.cat([-codebook.t(), codebook.t().square() / 2])  # [2 d, K]
        self.half = codebook.new_empty(len(self.importance), K)

    def __call__(self, channel: Tensor) -> Tensor:
        """Return the codes, int64 ``[G]``, of one input channel ``[G·d]``."""
        torch.mul(channel.view(-1, self.vector_size), self.importance, out=self.weighted)
        if not channel.is_cpu:
            return torch.mm(self.queries, self.table, out=self.half).argmin(dim=1)
        # numpy's product is four times, its argmin ten times as fast as torch's
        half = np.matmul(self.queries.numpy(), self.table.numpy(), out=self.half.numpy())
        return torch.from_numpy(half.argmin(axis=1))


def assign_with_feedback(
    columns: Tensor, codebook: Tensor, importance: Tensor, factor: Tensor, order: Tensor
) -> Tensor:
    """Choose codes channel after channel; the channels to come absorb each one's error.

    Args:
        columns: ``[in, G·d]``.
        codebook: ``[K, d]``.
        importance: ``[G·d]``.
        factor: Upper ``C [in, in]`` with ``Cᵀ C = H⁻¹``, rows and columns in ``order``.
        order: Input channels in the order of rounding, int64 ``[in]``.

    Returns:
        Codes, int64 ``[in, G]``, in the given order of channels.

    Source: GPTQ, arXiv 2210.17323; with vectors along the outputs it needs none of GPTVQ's
    (arXiv 2402.15319) grouping of input channels.
    """
    count = columns.shape[0]
    waiting = columns[order]
    nearest = Assignment(codebook, importance)
    pivots = factor.diagonal().tolist()
    codes = torch.empty(
        count, columns.shape[1] // codebook.shape[1], dtype=torch.int64, device=columns.device
    )
    for start in range(0, count, BLOCK_CHANNELS):
        stop = min(start + BLOCK_CHANNELS, count)
        errors = torch.empty_like(waiting[start:stop])
        for i in range(start, stop):
            codes[i] = nearest(waiting[i])
            error = (waiting[i] - codebook[codes[i]].view(-1)).div_(pivots[i])
            waiting[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        waiting[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes)


def improve_codes(
    columns: Tensor, codebook: Tensor, codes: Tensor, importance: Tensor, moment: Tensor
) -> Tensor:
    """Choose each channel's codes anew, best for all other channels as they are; one pass.

    The loss never rises: with the others fixed it is ``H_ii Σ g (t - c)²`` around the target
    ``t = ŵ_i + (H (W - Ŵ))_i / H_ii``.

    Args:
        columns: ``[in, G·d]``.
        codebook: ``[K, d]``.
        codes: Where to start, int64 ``[in, G]``; not modified.
        importance: ``[G·d]``.
        moment: ``H [in, in]`` with a positive diagonal.
    """
    count = columns.shape[0]
    nearest = Assignment(codebook, importance)
    rounded = codebook[codes].view(count, -1)
    gradient = matmul(moment, columns - rounded)  # [in, G·d]
    diagonal = moment.diagonal().tolist()
    better = codes.clone()
    for start in range(0, count, BLOCK_CHANNELS):
        stop = min(start + BLOCK_CHANNELS, count)
        inside = moment[start:stop, start:stop]
        changes = torch.empty_like(rounded[start:stop])
        for i in range(start, stop):
            better[i] = nearest(rounded[i] + gradient[i] / diagonal[i])
            change = codebook[better[i]].view(-1) - rounded[i]
            gradient[i + 1 : stop].addr_(inside[i - start, i - start + 1 :], change, alpha=-1)
            changes[i - start] = change
        gradient[stop:].addmm_(moment[stop:, start:stop], changes, alpha=-1)
    return better


def refit_codebook(
    columns: Tensor,
    codebook: Tensor,
    codes: Tensor,
    importance: Tensor,
    moment: Tensor,
    iterations: int = 10,
) -> Tensor:
    """Return the codebook ``[K, d]`` that is best for given codes, by conjugate gradients.

    The loss is quadratic in the codebook; entries without a vector stay as they are.

    Args:
        columns: ``[in, G·d]``.
        codebook: Where to start, ``[K, d]``; not modified.
        codes: int64 ``[in, G]``.
        importance: ``[G·d]``.
        moment: ``H [in, in]``, positive definite.
        iterations: Steps, preconditioned by the diagonal; each lowers the loss.
    """
    count, index = columns.shape[0], codes.view(-1)

    # on a GPU index_add_ has no order, so that sums would differ between runs
    sums = ClusterSums(index, len(codebook)) if index.is_cuda else None

    def gathered(weights: Tensor) -> Tensor:
        """Sum over the vectors of each entry, ``[in, G·d]`` to ``[K, d]``."""
        vectors = weights.reshape(-1, codebook.shape[1])
        if sums is not None:
            return sums(vectors)
        return torch.zeros_like(codebook).index_add_(0, index, vectors)

    def product(entries: Tensor) -> Tensor:
        return gathered(matmul(moment, entries[index].view(count, -1)) * importance)

    scale = gathered(moment.diagonal().unsqueeze(1) * importance)  # [K, d]
    scale = torch.where(scale > 0, scale, 1.0)
    error = columns - codebook[index].view(count, -1)
    residual = gathered(matmul(moment, error) * importance)
    fitted, direction = codebook.clone(), residual / scale
    size = (residual * direction).sum()
    for _ in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:  # at the minimum already
            break
        fitted += size / curvature * direction
        residual -= size / curvature * image
        scaled = residual / scale
        new_size = (residual * scaled).sum()
        direction = scaled + new_size / size * direction
        size = new_size
    return fitted
