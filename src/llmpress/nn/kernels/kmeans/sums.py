"""Sums over the members of each cluster: in a fixed order, and parallel where clusters are few."""

import torch
from torch import Tensor

PIECE = 256
"""Members that are added one after the other."""


class ClusterSums:
    """Adds up the rows of each cluster; made once for codes that several values are summed by.

    Args:
        codes: The cluster of each row, integers ``[N]``.
        num_clusters: ``K``.
    """

    def __init__(self, codes: Tensor, num_clusters: int) -> None:
        ordered, self.order = codes.sort(stable=True)
        lengths = ordered.bincount(minlength=num_clusters)
        self.pieces = -(-lengths // PIECE)
        owner = torch.repeat_interleave(self.pieces)
        place = torch.arange(len(owner), device=codes.device)
        first = (self.pieces.cumsum(0) - self.pieces)[owner]
        self.piece_lengths = (lengths[owner] - (place - first) * PIECE).clamp(max=PIECE)

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``[K, c]`` from ``values [N, c]``; zeros for a cluster without members."""
        parts = _segments(values[self.order], self.piece_lengths)
        return _segments(parts, self.pieces)


def _segments(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
