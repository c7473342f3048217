"""Group-wise uniform quantization: ``W ≈ scale · (code - zero_point)``.

Shapes: ``G = ceil(in / group_size)`` groups per output row, the last one shorter where the group
size does not divide ``in``.
"""

from typing import Any

import torch
from torch import Tensor

from llmpress.layers.base import CompressedLinear, frozen
from llmpress.packing import pack, packed_size, unpack


class QuantizedLinear(CompressedLinear):
    """A weight stored as packed n-bit codes with one scale and zero point per group.

    Args:
        num_bits: Bits of one code, 1 to 8.
        group_size: Consecutive input channels that share a scale and a zero point.
    """

    kind = "quantized"
    codes: Tensor
    zero_points: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_bits: int,
        group_size: int,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 1 <= num_bits <= 8:
            raise ValueError(f"num_bits={num_bits}: allowed are 1 to 8")
        if group_size < 1:
            raise ValueError(f"group_size={group_size}: must be positive")
        self.num_bits = num_bits
        self.group_size = group_size
        self.num_groups = -(-in_features // group_size)
        num_zeros = out_features * self.num_groups
        code_bytes = packed_size(self.num_weights, num_bits)
        self.register_buffer("codes", torch.empty(code_bytes, dtype=torch.uint8))
        self.register_buffer(
            "zero_points", torch.empty(packed_size(num_zeros, num_bits), dtype=torch.uint8)
        )
        self.scales = frozen(torch.empty(out_features, self.num_groups, dtype=torch.float16))

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int, group_size: int
    ) -> "QuantizedLinear":
        """Pack integer codes ``[out, in]`` with ``scales`` and ``zero_points`` ``[out, G]``."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, num_bits=num_bits, group_size=group_size)
        layer.codes = pack(codes, num_bits)
        layer.zero_points = pack(zero_points, num_bits)
        layer.scales.data = scales.to(torch.float16)
        return layer

    def spec(self) -> dict[str, Any]:
        """Return width and group size."""
        return {"num_bits": self.num_bits, "group_size": self.group_size}

    def dequantize(self) -> Tensor:
        """Return ``scale · (code - zero_point)`` as fp32 ``[out, in]``."""
        codes = unpack(self.codes, self.num_bits, self.num_weights)
        zeros = unpack(self.zero_points, self.num_bits, self.scales.numel())
        return dequantize_groups(
            codes.view(self.out_features, self.in_features),
            self.scales,
            zeros.view(self.out_features, self.num_groups),
            self.group_size,
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
    padded = torch.nn.functional.pad(codes, (0, -columns % group_size))
    centred = padded.view(rows, -1, group_size) - zero_points.unsqueeze(-1)  # [rows, G, group]
    return (centred * scales.float().unsqueeze(-1)).view(rows, -1)[:, :columns]
