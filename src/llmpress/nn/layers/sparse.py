"""A weight of which only the nonzero entries are stored: ``W ≈ scale · sparse(values)``.

Where the entries stand is written in one of two ways, row by row:

* ``bitmap``: one bit per weight;
* ``columns``: the number of entries of each row at ``bits(in)`` bits and the column of each entry
  at ``bits(in - 1)`` bits, where ``bits(n)`` is the length of ``n`` in binary.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from llmpress.nn.layers.base import CompressedLinear, frozen
from llmpress.nn.packing import MAX_BITS, pack, packed_size, unpack

Index = Literal["bitmap", "columns"]
VALUE_BITS = 16
SCALE_BITS = 32


class SparseLinear(CompressedLinear):
    """Entries in fp16, their places, and one fp32 scale for the matrix.

    The scale is a power of two that brings the largest entry into [1/2, 1]: fine-tuning deltas are
    so small that fp16 alone would lose their digits.

    Args:
        num_nonzeros: Number of stored entries.
        index: How their places are written.
    """

    kind = "sparse"
    trainable = ("values",)
    bitmap: Tensor
    row_counts: Tensor
    columns: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_nonzeros: int,
        index: Index,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 0 <= num_nonzeros <= self.num_weights:
            raise ValueError(
                f"num_nonzeros={num_nonzeros}: allowed are 0 to {self.num_weights} "
                f"for shape [{out_features}, {in_features}]"
            )
        if index not in ("bitmap", "columns"):
            raise ValueError(f"index={index!r}: allowed are 'bitmap' and 'columns'")
        self.num_nonzeros = num_nonzeros
        self.index: Index = index
        for name, (count, num_bits) in self._index_tensors().items():
            buffer = torch.empty(packed_size(count, num_bits), dtype=torch.uint8)
            self.register_buffer(name, buffer)
        self.values = frozen(torch.empty(num_nonzeros, dtype=torch.float16))
        self.scale = frozen(torch.empty(1, dtype=torch.float32))

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor) -> "SparseLinear":
        """Store the entries of ``weight [out, in]`` where the mask ``keep [out, in]`` is True."""
        out_features, in_features = weight.shape
        count = int(keep.sum())
        index = smaller_index(in_features, out_features, count)
        layer = cls(in_features, out_features, num_nonzeros=count, index=index)
        if index == "bitmap":
            layer.bitmap = pack(keep, 1)
        else:
            count_bits, column_bits = _widths(in_features)
            layer.row_counts = pack(keep.sum(dim=1), count_bits)
            layer.columns = pack(keep.nonzero()[:, 1], column_bits)
        entries = weight.detach()[keep].float()
        largest = entries.abs().max() if count else entries.new_zeros(())
        exponent = torch.frexp(largest).exponent  # largest = m · 2^exponent, m in [1/2, 1)
        exponent = exponent.clamp(-126, 126)  # both powers of two stay normal fp32 numbers
        layer.values.data = torch.ldexp(entries, -exponent).to(torch.float16)
        layer.scale.data = torch.ldexp(torch.ones(1, device=entries.device), exponent)
        return layer

    def spec(self) -> dict[str, Any]:
        """Return the number of entries and how their places are written."""
        return {"num_nonzeros": self.num_nonzeros, "index": self.index}

    def allocation(self) -> dict[str, float]:
        """Return the share that is kept."""
        return {"Weights kept, %": 100 * self.num_nonzeros / self.num_weights}

    def dequantize(self) -> Tensor:
        """Put every entry at its place: fp32 ``[out, in]``."""
        entries = self.values.float() * self.scale
        dense = torch.zeros(self.num_weights, dtype=torch.float32, device=entries.device)
        return dense.index_put((self._places(),), entries).view(self.out_features, self.in_features)

    def _places(self) -> Tensor:
        """Return the position of every entry in the flattened weight, ``[num_nonzeros]``."""
        if self.index == "bitmap":
            return unpack(self.bitmap, 1, self.num_weights).nonzero()[:, 0]
        count_bits, column_bits = _widths(self.in_features)
        counts = unpack(self.row_counts, count_bits, self.out_features)
        columns = unpack(self.columns, column_bits, self.num_nonzeros)
        first = torch.arange(self.out_features, device=counts.device) * self.in_features
        return first.repeat_interleave(counts, output_size=self.num_nonzeros) + columns

    def _index_tensors(self) -> dict[str, tuple[int, int]]:
        """Return how many values of how many bits each index tensor holds."""
        if self.index == "bitmap":
            return {"bitmap": (self.num_weights, 1)}
        count_bits, column_bits = _widths(self.in_features)
        return {
            "row_counts": (self.out_features, count_bits),
            "columns": (self.num_nonzeros, column_bits),
        }


def _widths(in_features: int) -> tuple[int, int]:
    """Return the bits of a row's count, which is 0 to ``in``, and of a column, 0 to ``in - 1``."""
    return in_features.bit_length(), max(1, (in_features - 1).bit_length())


def index_bits(in_features: int, out_features: int, num_nonzeros: int, index: Index) -> int:
    """Return the bits that the places of ``num_nonzeros`` entries take, whole bytes per tensor."""
    if index == "bitmap":
        return 8 * packed_size(in_features * out_features, 1)
    count_bits, column_bits = _widths(in_features)
    counts = packed_size(out_features, count_bits)
    return 8 * (counts + packed_size(num_nonzeros, column_bits))


def smaller_index(in_features: int, out_features: int, num_nonzeros: int) -> Index:
    """Return which of the two ways takes fewer bits; ``bitmap`` where rows are too long to pack."""
    if in_features.bit_length() > MAX_BITS:
        return "bitmap"
    shape = (in_features, out_features, num_nonzeros)
    return "columns" if index_bits(*shape, "columns") < index_bits(*shape, "bitmap") else "bitmap"


def sparse_bits(in_features: int, out_features: int, num_nonzeros: int) -> int:
    """Return the stored bits of a `SparseLinear` with ``num_nonzeros`` entries."""
    index = smaller_index(in_features, out_features, num_nonzeros)
    places = index_bits(in_features, out_features, num_nonzeros, index)
    return places + VALUE_BITS * num_nonzeros + SCALE_BITS
