"""Group-wise uniform quantization: ``W ≈ scale · (code - zero_point)``.

Shapes: ``G = ceil(in / group_size)`` groups per output row, the last one shorter where the group
size does not divide ``in``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.nn.kernels.cpu import MOST_ROWS, packed_matmul, packed_weight
from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.kernels.quantized_matmul import quantized_matmul
from llmpress.nn.kernels.quantized_matmul.reference import quantized_weight
from llmpress.nn.layers.base import CompressedLinear, as_rows, frozen
from llmpress.nn.packing import pack, packed_size


class QuantizedLinear(CompressedLinear):
    """A weight stored as packed n-bit codes with one scale and zero point per group.

    Args:
        num_bits: Bits of one code, 1 to 8.
        group_size: Consecutive input channels that share a scale and a zero point.
    """

    kind = "quantized"
    has_compiled = True
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

    def allocation(self) -> dict[str, float]:
        """Return the width of a code."""
        return {"Bits of a weight's code": self.num_bits}

    def dequantize(self) -> Tensor:
        """Return ``scale · (code - zero_point)`` as fp32 ``[out, in]``."""
        return quantized_weight(
            self.codes,
            self.scales,
            self.zero_points,
            self.num_bits,
            self.group_size,
            self.in_features,
        )

    def rebuilt_product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``; on a GPU by the kernel, which has gradients of its own."""
        return self.product(x) if uses_triton(self.codes) else super().rebuilt_product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, from the packed codes where a kernel does that."""
        on_cpu = self.scales.dtype == torch.float16 and self.computes_packed(x)
        if not on_cpu and not uses_triton(x):
            return super().product(x)
        rows = as_rows(x)
        stored = self.codes, self.scales, self.zero_points, self.num_bits, self.group_size
        if not on_cpu:
            y: Tensor = quantized_matmul(rows, *stored)
        elif len(rows) <= MOST_ROWS:
            y = packed_matmul(rows, *stored)
        else:
            y = functional.linear(rows, packed_weight(*stored, self.in_features, rows.dtype))
        return y.view(*x.shape[:-1], self.out_features)
