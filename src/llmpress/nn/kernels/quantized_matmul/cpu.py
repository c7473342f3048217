"""Few rows by a weight of up to 4 bits on a CPU: torch's own product with packed 4-bit weights.

It reads a quarter of the bytes of a dense bf16 weight. Codes of fewer bits are stored in 4.
"""

import torch
from torch import Tensor

from llmpress.nn.packing import unpack

MOST_ROWS = 4
"""Its time grows with the rows; above these a dense product is as fast, or faster if large."""
_GROUP_SIZES = (32, 64, 128, 256)
_OUTPUTS = 16
_VECTORS = ("AVX2", "AVX512")
"""Instruction sets that torch has it in; elsewhere it would be a plain loop."""


def has_cpu_product(num_bits: int, group_size: int, in_features: int, out_features: int) -> bool:
    """Whether there is a product for weights of this shape on this machine."""
    return (
        num_bits <= 4
        and group_size in _GROUP_SIZES
        and in_features % group_size == 0
        and out_features % _OUTPUTS == 0
        and torch.backends.cpu.get_cpu_capability() in _VECTORS
    )


def repacked_for_cpu(
    codes: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return what `cpu_product` multiplies by.

    Args:
        codes: Packed, uint8, of ``[out, in]`` integers.
        scales: ``[out, G]``, ``G = in / group_size``.
        zero_points: Packed, uint8, of ``[out, G]`` integers.
        num_bits: Bits of a code, 1 to 4.
        group_size: Consecutive inputs that share a scale and a zero point.

    Returns:
        Codes as torch orders them, uint8 ``[out, in / 2]``; bf16 ``[G, out, 2]``: scales, and
        the weights that code 8 stands for.
    """
    integers = unpack(codes, num_bits, scales.numel() * group_size).view(*scales.shape, group_size)
    zeros = unpack(zero_points, num_bits, scales.numel()).view(*scales.shape, 1)
    # Code 8 is zero there, as all codes of up to 3 bits can be; of 4 bits they stay what they are,
    # and what is added to a group is rounded once more.
    moved = 8 - zeros if num_bits < 4 else torch.zeros_like(zeros)
    rows = (integers + moved).view(len(scales), -1).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(rows, 2)
    rounded = scales.to(torch.bfloat16).float()
    added = (8 - zeros - moved)[..., 0] * rounded
    both = torch.stack([rounded, added], dim=-1).transpose(0, 1).contiguous()
    return packed, both.to(torch.bfloat16)


def cpu_product(x: Tensor, repacked: tuple[Tensor, ...], group_size: int) -> Tensor:
    """Return ``x Wᵀ``, bf16 ``[M, out]``, for bf16 ``x [M, in]``. Without gradients."""
    packed, scales = repacked
    return torch._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
