"""What weights take that layers keep on a CPU."""

import torch

from llmpress.nn.layers.blocked import in_blocks, stored_bytes


def kept_bytes(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """Return what a weight ``[out, in]`` takes in the order that it is kept in."""
    return sum(map(stored_bytes, in_blocks([torch.zeros(shape, dtype=dtype)])))
