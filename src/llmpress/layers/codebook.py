"""A weight stored as indices into a table of short vectors.

Dimensions: ``K`` codebook entries of ``d`` consecutive *output* channels of one input channel;
``N = in · ceil(out / d)`` vectors, in the order of ``Wᵀ`` cut into rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.layers.base import CompressedLinear, frozen
from llmpress.packing import pack, packed_size, unpack


class CodebookLinear(CompressedLinear):
    """A vector-quantized weight: packed codes and one codebook.

    Args:
        num_entries: ``K``, 1 to 65536.
        vector_size: ``d``.
        dtype: Stored dtype of the codebook.
    """

    kind = "codebook"
    trainable = ("codebook",)
    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_entries: int,
        vector_size: int,
        dtype: str = "float16",
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 1 <= num_entries <= 1 << 16:
            raise ValueError(f"num_entries={num_entries}: allowed are 1 to {1 << 16}")
        if vector_size < 1:
            raise ValueError(f"vector_size={vector_size}: must be positive")
        self.num_entries = num_entries
        self.vector_size = vector_size
        self.dtype_name = dtype
        self.num_vectors = in_features * -(-out_features // vector_size)
        code_bytes = packed_size(self.num_vectors, self.code_bits)
        self.register_buffer("codes", torch.empty(code_bytes, dtype=torch.uint8))
        self.codebook = frozen(torch.empty(num_entries, vector_size, dtype=getattr(torch, dtype)))
        self._indices: Tensor | None = None

    @property
    def code_bits(self) -> int:
        """Bits of one stored code, ``max(1, ceil(log2 K))``."""
        return max(1, (self.num_entries - 1).bit_length())

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        codebook: Tensor,
        in_features: int,
        out_features: int,
        dtype: str = "float16",
    ) -> "CodebookLinear":
        """Pack ``codes [N]`` that index ``codebook [K, d]``."""
        K, d = codebook.shape
        layer = cls(in_features, out_features, num_entries=K, vector_size=d, dtype=dtype)
        layer.codes = pack(codes, layer.code_bits)
        layer.codebook.data = codebook.to(layer.codebook.dtype)
        return layer

    def spec(self) -> dict[str, Any]:
        """Return the codebook's shape and stored dtype."""
        return {
            "num_entries": self.num_entries,
            "vector_size": self.vector_size,
            "dtype": self.dtype_name,
        }

    def keep_indices(self, keep: bool) -> None:
        """Hold the unpacked codes between calls (finetuning), or drop them again."""
        self._indices = self._unpack() if keep else None

    def dequantize(self) -> Tensor:
        """Look every vector up, cut the padding and transpose: fp32 ``[out, in]``."""
        indices = self._unpack() if self._indices is None else self._indices
        # embedding, not indexing: its backward is the scatter-add dL/dcodebook[k] = Σ dL/dv_n
        vectors = functional.embedding(indices, self.codebook.float())  # [N, d]
        return vectors.view(self.in_features, -1)[:, : self.out_features].t()

    def _unpack(self) -> Tensor:
        return unpack(self.codes, self.code_bits, self.num_vectors)
