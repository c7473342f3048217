"""``y = x · Wᵀ`` with a group-quantized ``W``, as a formula.

``W[o, i] = s[o, g] · (code[o, i] - z[o, g])`` with ``g = i // group_size``, ``code [out, in]`` and
``s``, ``z [out, G]``, ``G = ceil(in / group_size)``. Codes and zero points are packed, see
`llmpress.nn.packing`.
"""

from torch import Tensor
from torch.nn import functional

from llmpress.nn.packing import unpack


def quantized_weight(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Return ``W``, fp32 ``[out, in]``."""
    rows = scales.shape[0]
    return dequantize_groups(
        unpack(codes, num_bits, rows * in_features).view(rows, in_features),
        scales,
        unpack(zero_points, num_bits, scales.numel()).view(scales.shape),
        group_size,
    )


def dequantize_groups(
    codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int
) -> Tensor:
    """Return ``scale · (code - zero_point)``.

    Args:
        codes: Integers ``[rows, columns]``.
        scales: ``[rows, G]``, ``G = ceil(columns / group_size)``.
        zero_points: Integers ``[rows, G]``.
        group_size: Consecutive columns that share a scale.

    Returns:
        fp32 ``[rows, columns]``.
    """
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % group_size))
    centred = padded.view(rows, -1, group_size) - zero_points.unsqueeze(-1)  # [rows, G, group]
    return (centred * scales.float().unsqueeze(-1)).view(rows, -1)[:, :columns]


def quantized_matmul_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]`` in the dtype of ``x [M, in]``; computed in fp32."""
    weight = quantized_weight(codes, scales, zero_points, num_bits, group_size, x.shape[1])
    return (x.float() @ weight.t()).to(x.dtype)
