"""Unstructured pruning: few entries are kept, the others are zero and not stored."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmpress.methods.base import InputStatistics, Method, Shape, Work, checked_weight
from llmpress.nn.layers.sparse import SparseLinear, smaller_index, sparse_bits


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the largest entries, or random ones.

    Exactly one of ``sparsity`` and ``bits`` is given.

    Attributes:
        sparsity: Fraction of entries dropped, 0 to below 1.
        bits: True bits per weight: entries, their places and the scale together.
        mode: ``magnitude`` keeps the largest entries of the matrix; ``dare`` keeps random ones and
            multiplies them by ``entries / kept``, so that the mean over seeds is the weight.
    """

    sparsity: float | None = None
    bits: float | None = None
    mode: Literal["magnitude", "dare"] = "magnitude"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.bits is None):
            raise ValueError(
                f"sparsity={self.sparsity}, bits={self.bits}: give exactly one of them"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: allowed are 0 to below 1")
        if self.bits is not None and not self.bits > 0:
            raise ValueError(f"bits={self.bits}: must be positive")
        if self.mode not in ("magnitude", "dare"):
            raise ValueError(f"mode={self.mode!r}: allowed are 'magnitude' and 'dare'")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> SparseLinear:
        """Prune ``weight [out, in]``; statistics are not used, the seed only by ``dare``.

        Raises:
            ValueError: A weight that is no finite float matrix; a budget too small for one entry.

        Source: ``dare`` is arXiv 2311.03099, section 3. Deviation: exactly the wanted number of
        entries is kept, where the authors drop each entry by itself with a fixed probability.
        """
        del statistics
        weight = checked_weight(weight)
        count = self.num_kept(Shape(*weight.shape))
        if self.mode == "magnitude":
            # A stable sort, not topk: which of two equal entries stays is the same everywhere.
            kept = weight.flatten().abs().argsort(descending=True, stable=True)[:count]
        else:
            generator = torch.Generator().manual_seed(seed)
            kept = torch.randperm(weight.numel(), generator=generator)[:count].to(weight.device)
            weight = weight * (weight.numel() / count)
        keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        keep[kept] = True
        return SparseLinear.from_dense(weight, keep.view_as(weight))

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the bits of a single entry."""
        out_features, in_features = shape
        return sparse_bits(in_features, out_features, 1) / (out_features * in_features)

    def num_kept(self, shape: Shape) -> int:
        """Return how many entries stay: at least one."""
        out_features, in_features = shape
        if self.sparsity is not None:
            return max(1, round((1 - self.sparsity) * shape.num_weights))
        budget = (self.bits or 0.0) * shape.num_weights
        counts = range(shape.num_weights + 1)
        within = bisect_right(
            counts, budget, key=lambda n: sparse_bits(in_features, out_features, n)
        )
        if within < 2:
            needed = sparse_bits(in_features, out_features, 1) / shape.num_weights
            raise ValueError(
                f"bits={self.bits}: a matrix of shape {list(shape)} needs at least "
                f"{math.ceil(needed * 1e4) / 1e4:.4f} bits per weight"
            )
        return within - 1

    def empty_layer(self, shape: Shape) -> SparseLinear:
        """Return as many entries as stay."""
        out_features, in_features = shape
        count = self.num_kept(shape)
        index = smaller_index(in_features, out_features, count)
        return SparseLinear.empty(shape, num_nonzeros=count, index=index)

    def work(self, shape: Shape) -> Work:
        """Return the work of sorting the entries, or of shuffling them."""
        per_weight = 1700.0 if self.mode == "magnitude" else 500.0
        return Work(bytes_moved=per_weight * shape.num_weights)

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the entries, their order and their places."""
        return 60 * shape.num_weights
