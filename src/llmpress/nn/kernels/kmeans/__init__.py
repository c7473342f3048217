"""Weighted k-means: dispatch by device. On the CPU faiss does the work."""

import importlib.util

import torch
from torch import Tensor

from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.kernels.kmeans.reference import draw_start, kmeans_reference

FAISS_FAST_POINTS = 33_000
"""faiss 1.15 takes about twenty times longer per point on fewer than some 32 thousand points."""


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cluster points by Lloyd's algorithm, squared Euclidean distance, one random start.

    Args:
        points: fp32 ``[N, d]``; all of them are used in every iteration.
        num_clusters: ``K``, at most ``N``.
        weights: Weight of each point, fp32 ``[N]``, not negative; equal ones by default.
        iterations: Lloyd iterations.
        seed: Same seed, same result.

    Returns:
        Centroids fp32 ``[K, d]`` and the index of each point's nearest centroid, int64 ``[N]``.

    Raises:
        ValueError: More clusters than points, or weights of another length.
        ImportError: faiss is missing where points lie on the CPU.
    """
    N = points.shape[0]
    if not 1 <= num_clusters <= N:
        raise ValueError(f"num_clusters={num_clusters}: allowed are 1 to {N}, the number of points")
    if weights is None:
        weights = points.new_ones(N)
    if weights.shape != (N,):
        raise ValueError(f"weights: one per point is needed, [{N}], not {list(weights.shape)}")
    start = draw_start(points, num_clusters, weights, seed)
    if uses_triton(points):
        from llmpress.nn.kernels.kmeans.triton import kmeans_triton

        return kmeans_triton(points, start, weights, iterations)
    if points.device.type != "cpu":
        return kmeans_reference(points, start, weights, iterations)
    if importlib.util.find_spec("faiss") is None:
        raise ImportError("k-means on the CPU needs faiss: pip install faiss-cpu")
    return _kmeans_faiss(points, start, weights, iterations)


def num_copies(num_points: int, num_clusters: int) -> int:
    """Return how often few points are repeated on the CPU, where faiss is slow with them."""
    if num_points * num_clusters <= FAISS_FAST_POINTS:
        return 1
    return -(-FAISS_FAST_POINTS // num_points)


def _kmeans_faiss(
    points: Tensor, start: Tensor, weights: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    import faiss

    N, d = points.shape
    K = start.shape[0]
    copies = num_copies(N, K)
    data = points.repeat(copies, 1).numpy()  # copies beyond the first weigh nothing
    mass = torch.nn.functional.pad(weights, (0, N * (copies - 1))).numpy()
    clustering = faiss.Kmeans(
        d, K, niter=iterations, min_points_per_centroid=1, max_points_per_centroid=len(data)
    )
    clustering.train(data, weights=mass, init_centroids=start.numpy())
    _, codes = clustering.index.search(data, 1)  # [N * copies, 1]
    centroids = torch.tensor(clustering.centroids)  # a copy: the originals die with faiss's object
    return centroids, torch.tensor(codes[:N, 0])
