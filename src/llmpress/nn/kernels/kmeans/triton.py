"""Weighted k-means without the ``N × K`` matrix of distances.

Assignment goes over the centroids tile by tile and keeps the nearest one so far; distances are sums
of fp32 products, not of tensor cores' shorter ones. Centroids are sums over the points sorted by
cluster, in a fixed order, so that the same seed gives the same result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmpress.nn.kernels.dispatch import on_its_device
from llmpress.nn.kernels.kmeans.sums import ClusterSums


@triton.jit
def _assign_kernel(
    points_ptr,
    centroids_ptr,
    norms_ptr,
    codes_ptr,
    num_points,
    num_clusters,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_points
    row = offs_n.to(tl.int64) * SIZE
    least = tl.full([BLOCK_N, BLOCK_K], float("inf"), dtype=tl.float32)
    tile = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
    for first in range(0, num_clusters, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < num_clusters
        norms = tl.load(norms_ptr + offs_k, mask=mask_k, other=float("inf"))
        distance = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32) + norms[None, :]
        for t in tl.static_range(SIZE):
            x = tl.load(points_ptr + row + t, mask=mask_n, other=0)
            c = tl.load(centroids_ptr + offs_k * SIZE + t, mask=mask_k, other=0)
            distance -= 2 * x[:, None] * c[None, :]
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        tile = tl.where(nearer, first, tile)
    nearest = tl.min(least, axis=1)
    index = tile + tl.arange(0, BLOCK_K)[None, :]
    index = tl.where(least == nearest[:, None], index, num_clusters)
    tl.store(codes_ptr + offs_n, tl.min(index, axis=1), mask=mask_n)


@on_its_device
def nearest_centroid_triton(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each point, int64 ``[N]``; the first of equals.

    Args:
        points: fp32 ``[N, d]``, contiguous, d up to some 32.
        centroids: fp32 ``[K, d]``, contiguous.
    """
    N, d = points.shape
    codes = points.new_empty(N, dtype=torch.int32)
    block_n, block_k = (64, 32) if d <= 4 else (32, 32)  # larger ones spill registers
    _assign_kernel[(triton.cdiv(N, block_n),)](
        points,
        centroids,
        centroids.square().sum(dim=1),
        codes,
        N,
        centroids.shape[0],
        SIZE=d,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return codes.long()


def kmeans_triton(
    points: Tensor, start: Tensor, weights: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's algorithm from ``start [K, d]``; an empty cluster keeps its centroid."""
    K = start.shape[0]
    points, centroids = points.contiguous(), start.contiguous().clone()
    weighted = torch.cat([weights.unsqueeze(1), weights.unsqueeze(1) * points], dim=1)  # [N, 1 + d]
    for _ in range(iterations):
        sums = ClusterSums(nearest_centroid_triton(points, centroids), K)(weighted)
        filled = sums[:, 0] > 0
        centroids[filled] = sums[filled, 1:] / sums[filled, :1]
    return centroids, nearest_centroid_triton(points, centroids)
