"""A weight stored as one bit per entry and a single scale: ``W ≈ scale · sign(W)``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.nn.kernels.cpu import MOST_ROWS, sign_matmul, sign_weight
from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.kernels.quantized_matmul import quantized_matmul
from llmpress.nn.layers.base import CompressedLinear, as_rows, frozen
from llmpress.nn.packing import pack, packed_size, unpack


class SignLinear(CompressedLinear):
    """Packed signs, row by row, a set bit standing for ``+1``; one fp32 scale for the matrix."""

    kind = "sign"
    has_compiled = True
    trainable = ("scale",)
    signs: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer(
            "signs", torch.empty(packed_size(self.num_weights, 1), dtype=torch.uint8)
        )
        self.scale = frozen(torch.empty(1, dtype=torch.float32))

    @classmethod
    def from_signs(cls, positive: Tensor, scale: Tensor) -> "SignLinear":
        """Pack the mask ``positive [out, in]`` (True: ``+1``, False: ``-1``) with one ``scale``."""
        out_features, in_features = positive.shape
        layer = cls(in_features, out_features)
        layer.signs = pack(positive, 1)
        layer.scale.data = scale.detach().to(torch.float32).reshape(1)
        return layer

    def spec(self) -> dict[str, Any]:
        """Return nothing: the shape says it all."""
        return {}

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, from the packed signs where a kernel does that.

        A sign is ``2 · bit - 1``: two products with the bits, less the sum of the inputs, in fp32.
        """
        if self.computes_packed(x):
            return self._computed_packed(x)
        if not uses_triton(x):
            return super().product(x)
        rows = as_rows(x).float()
        twice = rows.new_full((self.out_features, 1), 2)
        zeros = self.signs.new_zeros(packed_size(self.out_features, 1))
        bits: Tensor = quantized_matmul(rows, self.signs, twice, zeros, 1, self.in_features)
        y = (bits - rows.sum(dim=1, keepdim=True)) * self.scale
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _computed_packed(self, x: Tensor) -> Tensor:
        rows, scale, out = as_rows(x), float(self.scale), self.out_features
        if len(rows) <= MOST_ROWS:
            y = sign_matmul(rows, self.signs, scale, out)
        else:
            weight = sign_weight(self.signs, scale, out, self.in_features, rows.dtype)
            y = functional.linear(rows, weight)
        return y.view(*x.shape[:-1], out)

    def dequantize(self) -> Tensor:
        """Return ``scale · (±1)`` as fp32 ``[out, in]``."""
        bits = unpack(self.signs, 1, self.num_weights).view(self.out_features, self.in_features)
        return (2 * bits - 1) * self.scale
