"""Weighted k-means as a formula.

``code[n] = argmin_k ‖x_n - c_k‖²`` and ``c_k = Σ_{code[n]=k} w_n x_n / Σ_{code[n]=k} w_n``, in
turn,
from K of the points drawn with probability in proportion to ``w_n ‖x_n‖²``, which gets outliers
into the start. Shapes: ``x [N, d]``, ``c [K, d]``, ``w [N]``.
"""

import torch
from torch import Tensor


def kmeans_reference(
    points: Tensor, start: Tensor, weights: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm from ``start [K, d]``; an empty cluster keeps its centroid."""
    K, d = start.shape
    centroids = start.clone()
    for _ in range(iterations):
        codes = nearest_centroid(points, centroids)
        mass = weights.new_zeros(K).index_add_(0, codes, weights)
        total = points.new_zeros(K, d).index_add_(0, codes, weights.unsqueeze(1) * points)
        filled = mass > 0
        centroids[filled] = total[filled] / mass[filled].unsqueeze(1)
    return centroids, nearest_centroid(points, centroids)


def draw_start(points: Tensor, num_clusters: int, weights: Tensor, seed: int) -> Tensor:
    """Return ``num_clusters`` distinct points ``[K, d]``, drawn in proportion to ``w ‖x‖²``.

    A GPU draws others than a CPU.
    """
    generator = torch.Generator(points.device).manual_seed(seed % (1 << 63))
    size = (weights * points.square().sum(dim=1)).double()
    race = torch.empty_like(size).exponential_(generator=generator)
    keys = size.clamp(min=1e-30) / race  # the K largest keys are a draw without replacement
    return points[keys.topk(num_clusters).indices]


def nearest_centroid(points: Tensor, centroids: Tensor, chunk: int = 16384) -> Tensor:
    """Return the index of the nearest centroid of each point, int64 ``[N]``."""
    norms = centroids.square().sum(dim=1)  # [K]
    return torch.cat(
        [
            (norms - 2 * part @ centroids.t()).argmin(dim=1) for part in points.split(chunk)
        ]  # [chunk]
    )
