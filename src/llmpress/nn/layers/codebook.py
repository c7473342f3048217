"""A weight stored as indices into a table of short vectors.

Dimensions: ``K`` codebook entries of ``d`` consecutive *output* channels of one input channel;
``N = in · ceil(out / d)`` vectors, in the order of ``Wᵀ`` cut into rows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmpress.nn.kernels import cpu
from llmpress.nn.kernels.codebook_matmul import codebook_matmul
from llmpress.nn.kernels.codebook_matmul.reference import looked_up
from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.layers.base import CompressedLinear, as_rows, frozen, rounded_to
from llmpress.nn.packing import code_width, pack, packed_size, unpack

DTYPES = ("float16", "bfloat16", "float32", "int8")


class CodebookLinear(CompressedLinear):
    """A vector-quantized weight: packed codes, one codebook, and a scale per output channel.

    Args:
        num_entries: ``K``, 1 to 65536.
        vector_size: ``d``.
        dtype: Stored dtype of the codebook; int8 needs scales.
        scaled: Whether every output channel has a scale, in fp16.
    """

    kind = "codebook"
    has_compiled = True
    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_entries: int,
        vector_size: int,
        dtype: str = "float16",
        scaled: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 1 <= num_entries <= 1 << 16:
            raise ValueError(f"num_entries={num_entries}: allowed are 1 to {1 << 16}")
        if vector_size < 1:
            raise ValueError(f"vector_size={vector_size}: must be positive")
        if dtype not in DTYPES or (dtype == "int8" and not scaled):
            raise ValueError(f"dtype={dtype!r}: known are {', '.join(DTYPES)}; int8 needs scales")
        self.num_entries = num_entries
        self.vector_size = vector_size
        self.dtype_name = dtype
        self.num_vectors = in_features * -(-out_features // vector_size)
        code_bytes = packed_size(self.num_vectors, self.code_bits)
        self.register_buffer("codes", torch.empty(code_bytes, dtype=torch.uint8))
        self.codebook = frozen(torch.empty(num_entries, vector_size, dtype=getattr(torch, dtype)))
        self.scales = frozen(torch.empty(out_features, dtype=torch.float16)) if scaled else None
        self.trainable = ("codebook", "scales") if scaled else ("codebook",)
        self._indices: Tensor | None = None

    @property
    def code_bits(self) -> int:
        """Bits of one stored code, ``max(1, ceil(log2 K))``."""
        return code_width(self.num_entries)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook: Tensor,
        in_features: int,
        out_features: int,
        dtype: str = "float16",
        scales: Tensor | None = None,
    ) -> "CodebookLinear":
        """Pack ``codes [N]`` that index ``codebook [K, d]``, in units of ``scales [out]``."""
        K, d = codebook.shape
        layer = cls(
            in_features,
            out_features,
            num_entries=K,
            vector_size=d,
            dtype=dtype,
            scaled=scales is not None,
        )
        layer.codes = pack(codes, layer.code_bits)
        layer.codebook.data = rounded_to(codebook, layer.codebook.dtype)
        if layer.scales is not None and scales is not None:
            layer.scales.data = scales.to(layer.scales.dtype)
        return layer

    def spec(self) -> dict[str, Any]:
        """Return the codebook's shape and stored dtype, and whether there are scales."""
        return {
            "num_entries": self.num_entries,
            "vector_size": self.vector_size,
            "dtype": self.dtype_name,
            "scaled": self.scales is not None,
        }

    def allocation(self) -> dict[str, float]:
        """Return the codebook's size, and what its codes take without it."""
        return {
            "Bits of a weight's code": math.log2(self.num_entries) / self.vector_size,
            "Codebook entries K": self.num_entries,
            "Codebook vector length d": self.vector_size,
        }

    def keep_unpacked(self, keep: bool) -> None:
        """Hold the unpacked codes, or drop them again."""
        self._indices = self._unpack() if keep else None

    def dequantize(self) -> Tensor:
        """Look every vector up, cut the padding, transpose and scale: fp32 ``[out, in]``."""
        indices = self._unpack() if self._indices is None else self._indices
        return looked_up(indices, self.codebook, self.scales, self.in_features, self.out_features)

    def held_bytes(self) -> int:
        """Return the bytes of the unpacked codes."""
        return 4 * self.num_vectors

    def rebuilt_product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``; on a GPU by the kernel, which has gradients of its own."""
        return self.product(x) if uses_triton(self.codes) else super().rebuilt_product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, from the packed codes where a kernel does that."""
        on_cpu = self._has_stored_dtypes() and self.computes_packed(x)
        if not on_cpu and not uses_triton(x):
            return super().product(x)
        rows = as_rows(x)
        stored = self.codes, self.codebook, self.scales
        if not on_cpu:
            y: Tensor = codebook_matmul(rows, *stored, self.out_features)
        elif len(rows) <= cpu.MOST_ROWS:
            y = cpu.codebook_matmul(rows, *stored, self.out_features, self.code_bits)
        else:
            shape = self.in_features, self.out_features, self.code_bits
            y = rows @ cpu.transposed_codebook_weight(*stored, *shape, rows.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _has_stored_dtypes(self) -> bool:
        """Whether no tensor is in another dtype, as while it trains."""
        return self.scales is None or self.scales.dtype == torch.float16

    def _unpack(self) -> Tensor:
        return unpack(self.codes, self.code_bits, self.num_vectors)
