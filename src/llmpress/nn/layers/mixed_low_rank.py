"""A weight stored as thin factors whose leading singular triplets have more bits than the others.

``W ≈ c · Σ_g U_g diag(σ_g) V_g`` with ``V_g [r_g, in]``, ``U_g [out, r_g]``, ``σ_g [r_g]`` and one
power of two ``c``. Both factors are stored vector by vector: ``V_g`` as it is, ``U_g`` transposed,
so that a scale group is a run of consecutive channels of *one* singular vector, however small
``r_g`` is.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmpress.nn.kernels.cpu import packed_weight
from llmpress.nn.kernels.delta_matmul import (
    PackedDeltas,
    PackedVectors,
    RowOwners,
    TripletGroup,
    delta_matmul,
)
from llmpress.nn.kernels.dispatch import uses_compiled, uses_triton
from llmpress.nn.kernels.quantized_matmul.reference import dequantize_groups
from llmpress.nn.layers.base import CompressedLinear, SumByRow, as_rows, frozen, rank_allocation
from llmpress.nn.layers.blocked import linear
from llmpress.nn.layers.dense_store import State
from llmpress.nn.packing import pack, packed_size, unpack

UNQUANTIZED = 16
SCALE_BITS = 32
MOST_ROWS = 64
"""That a kernel multiplies by packed vectors; for more of them unpacking does not count."""


class Vectors(NamedTuple):
    """Quantized vectors, one per row: ``scale · (code - zero_point)``.

    Attributes:
        codes: Integers ``[r, n]``; at 16 bits the vectors themselves, float ``[r, n]``.
        scales: ``[r, ceil(n / group_size)]``, None at 16 bits.
        zero_points: Integers like ``scales``, None at 16 bits.
    """

    codes: Tensor
    scales: Tensor | None = None
    zero_points: Tensor | None = None


class MixedLowRankLinear(CompressedLinear):
    """Two thin linears in a row per group of singular triplets; the dense weight is never formed.

    What may train are the scales of the vectors; unquantized vectors train themselves. ``σ`` stays:
    it would only repeat what they do, and its entries differ by orders of magnitude.

    Args:
        groups: ``{"rank": r_g, "num_bits": b_g}`` per group, ``b_g`` 1 to 8, or 16 for plain fp16.
        group_size: Consecutive channels of a singular vector that share a scale and a zero point.
    """

    kind = "mixed_low_rank"
    has_compiled = True
    has_factors = True
    sigma: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        groups: Sequence[dict[str, int]],
        group_size: int,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.groups = [(int(g["rank"]), int(g["num_bits"])) for g in groups]
        if group_size < 1:
            raise ValueError(f"group_size={group_size}: must be positive")
        self.group_size = group_size
        for index, (rank, num_bits) in enumerate(self.groups):
            if rank < 1:
                raise ValueError(f"groups[{index}]: rank={rank} must be positive")
            if not (1 <= num_bits <= 8 or num_bits == UNQUANTIZED):
                raise ValueError(
                    f"groups[{index}]: num_bits={num_bits}: allowed are 1 to 8, and 16"
                )
            for side, length in (("V", in_features), ("U", out_features)):
                self._register(f"{side}{index}", rank, length, num_bits)
        self.trainable = tuple(
            f"{side}{index}" if num_bits == UNQUANTIZED else f"{side}{index}_scales"
            for index, (_, num_bits) in enumerate(self.groups)
            for side in ("V", "U")
        )
        self.sigma = frozen(torch.empty(self.rank, dtype=torch.float16))
        self.scale = frozen(torch.empty(1, dtype=torch.float32))
        self._sum: tuple[State, SumByRow] | None = None

    def _register(self, name: str, rank: int, length: int, num_bits: int) -> None:
        if num_bits == UNQUANTIZED:
            self.register_parameter(name, frozen(torch.empty(rank, length, dtype=torch.float16)))
            return
        num_scales = -(-length // self.group_size)
        for part, count in (("codes", rank * length), ("zero_points", rank * num_scales)):
            buffer = torch.empty(packed_size(count, num_bits), dtype=torch.uint8)
            self.register_buffer(f"{name}_{part}", buffer)
        scales = frozen(torch.empty(rank, num_scales, dtype=torch.float16))
        self.register_parameter(f"{name}_scales", scales)

    @classmethod
    def from_vectors(
        cls,
        V: Sequence[Vectors],
        U: Sequence[Vectors],
        sigma: Tensor,
        scale: float,
        *,
        num_bits: Sequence[int],
        group_size: int,
        shape: tuple[int, int],
    ) -> "MixedLowRankLinear":
        """Pack quantized singular vectors.

        Args:
            V: Per group the right vectors, ``[r_g, in]``.
            U: Per group the left vectors, transposed: ``[r_g, out]``.
            sigma: ``[Σ r_g]``, finite in fp16.
            scale: The factor ``c`` that everything is multiplied with.
            num_bits: Bits per group.
            group_size: What the vectors were quantized with.
            shape: ``(out, in)`` of the weight.
        """
        ranks = [vectors.codes.shape[0] for vectors in V]
        groups = [{"rank": r, "num_bits": b} for r, b in zip(ranks, num_bits, strict=True)]
        layer = cls(shape[1], shape[0], groups=groups, group_size=group_size)
        for index in range(len(groups)):
            layer._store(f"V{index}", V[index], num_bits[index])
            layer._store(f"U{index}", U[index], num_bits[index])
        layer.sigma.data = sigma.detach().to(torch.float16)
        layer.scale.data = torch.full((1,), scale, dtype=torch.float32, device=sigma.device)
        return layer

    def _store(self, name: str, vectors: Vectors, num_bits: int) -> None:
        if num_bits == UNQUANTIZED:
            self.get_parameter(name).data = vectors.codes.detach().to(torch.float16).contiguous()
            return
        if vectors.scales is None or vectors.zero_points is None:
            raise ValueError(f"{name}: vectors of {num_bits} bits need scales and zero points")
        setattr(self, f"{name}_codes", pack(vectors.codes, num_bits))
        setattr(self, f"{name}_zero_points", pack(vectors.zero_points, num_bits))
        self.get_parameter(f"{name}_scales").data = vectors.scales.detach().to(torch.float16)

    @property
    def rank(self) -> int:
        """Number of all stored singular triplets."""
        return sum(rank for rank, _ in self.groups)

    def spec(self) -> dict[str, Any]:
        """Return rank and bits of every group, and the size of a scale group."""
        groups = [{"rank": rank, "num_bits": num_bits} for rank, num_bits in self.groups]
        return {"groups": groups, "group_size": self.group_size}

    def allocation(self) -> dict[str, float]:
        """Return the rank, and its parts by precision."""
        parts = {f"Rank at {num_bits} bits": 0.0 for _, num_bits in self.groups}
        for rank, num_bits in self.groups:
            parts[f"Rank at {num_bits} bits"] += rank
        return rank_allocation(self.rank, self) | parts

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A = c · U diag(σ)``, ``[out, rank]``, and ``V``, ``[rank, in]``, in fp32."""
        V = [self._vectors(f"V{i}", self.in_features, *g) for i, g in enumerate(self.groups)]
        U = [self._vectors(f"U{i}", self.out_features, *g) for i, g in enumerate(self.groups)]
        empty = self.scale.new_zeros(0, 1)
        left = torch.cat(U or [empty.expand(0, self.out_features)])  # [rank, out]
        right = torch.cat(V or [empty.expand(0, self.in_features)])  # [rank, in]
        return (left * (self.sigma.float() * self.scale).unsqueeze(-1)).t(), right

    def _vectors(self, name: str, length: int, rank: int, num_bits: int) -> Tensor:
        if num_bits == UNQUANTIZED:
            return self.get_parameter(name).float()
        scales = self.get_parameter(f"{name}_scales")
        if self._reads_packed(scales):
            packed = self._packed(name)
            widths = num_bits, self.group_size, length
            return packed_weight(packed.codes, scales, packed.zero_points, *widths, torch.float32)
        codes = unpack(self.get_buffer(f"{name}_codes"), num_bits, rank * length)
        zeros = unpack(self.get_buffer(f"{name}_zero_points"), num_bits, scales.numel())
        stored = Vectors(codes.view(rank, length), scales, zeros.view(scales.shape))
        return dequantize_vectors(stored, self.group_size)

    def _reads_packed(self, scales: Tensor) -> bool:
        """Whether the library for CPUs unpacks vectors: to the same bits as torch, and faster."""
        trains = torch.is_grad_enabled() and scales.requires_grad
        is_stored = scales.dtype == torch.float16
        return (
            is_stored and uses_compiled(scales) and not trains and not torch.compiler.is_compiling()
        )

    def dequantize(self) -> Tensor:
        """Return ``c · Σ_g U_g diag(σ_g) V_g`` as fp32 ``[out, in]``."""
        A, V = self.factors()
        return A @ V

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ``, ``[..., out]``, through the two thin factors."""
        if self.computes_packed(x) and x.numel() <= MOST_ROWS * self.in_features:
            rows = as_rows(x)
            zeros = rows.new_zeros(len(rows), self.out_features)
            added = self._kernel()(zeros, rows, rows_of_one(len(rows)))
            return added.view(*x.shape[:-1], self.out_features)
        return through_factors(x, *self.unpacked(x))

    def rebuilt_product(self, x: Tensor) -> Tensor:
        """Return `product`; the factors are unpacked again in the backward pass."""

        def product(x: Tensor) -> Tensor:
            A, V = self.factors()
            return through_factors(x, A.to(x.dtype), V.to(x.dtype))

        output: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
        return output

    def computes_packed(self, x: Tensor) -> bool:
        """Whether to multiply ``x`` by packed vectors on a CPU; not where some are unquantized."""
        return self._is_packed and super().computes_packed(x)

    @property
    def _is_packed(self) -> bool:
        return all(num_bits != UNQUANTIZED for _, num_bits in self.groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: without addresses of this layer's tensors."""
        return {**self.__dict__, "_sum": None}

    def sum_key(self) -> Hashable:
        """Return the size of a scale group; None where some vectors are not quantized."""
        return self.group_size if self._is_packed and self.bias is None else None

    @classmethod
    def sum_by_row(cls, layers: Sequence[Self | None]) -> SumByRow:
        """Return the kernel that reads packed vectors."""
        group_size = next(layer.group_size for layer in layers if layer is not None)
        groups = [[] if layer is None else layer.triplet_groups() for layer in layers]
        deltas = PackedDeltas(groups, group_size)
        return lambda y, x, owners: delta_matmul(x, y, deltas, owners)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + self(x)``; for few rows from the packed vectors where a kernel does that."""
        count = x.numel() // self.in_features
        has_kernel = self.sum_key() is not None and (
            self.computes_packed(x) or self._uses_triton(x)
        )
        if count > MOST_ROWS or not has_kernel:
            return super().added_to(y, x)
        flat = y.reshape(-1, self.out_features).to(x.dtype)
        return self._kernel()(flat, as_rows(x), rows_of_one(count)).view_as(y)

    def _uses_triton(self, x: Tensor) -> bool:
        blocked = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return uses_triton(x) and not blocked

    def _kernel(self) -> SumByRow:
        # It reads codes and scales where they are; what it has copies of are these two, and when
        # the layer moves they move with all others.
        made_of = self.sigma, self.scale
        if self._sum is None or not self._sum[0].is_of(made_of):
            self._sum = State(made_of), self.sum_by_row([self])
        return self._sum[1]

    def _unpack_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        A, V = self.factors()
        return A.to(dtype), V.to(dtype)

    def _num_unpacked(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    def triplet_groups(self) -> list[TripletGroup]:
        """Return what a kernel needs of each group, all of them quantized."""
        ranks = [rank for rank, _ in self.groups]
        sigma = (self.sigma.float() * self.scale).split(ranks) if ranks else ()
        return [
            TripletGroup(num_bits, self._packed(f"V{i}"), self._packed(f"U{i}"), sigma[i])
            for i, (_, num_bits) in enumerate(self.groups)
        ]

    def _packed(self, name: str) -> PackedVectors:
        return PackedVectors(
            self.get_buffer(f"{name}_codes"),
            self.get_parameter(f"{name}_scales"),
            self.get_buffer(f"{name}_zero_points"),
        )


@lru_cache(maxsize=MOST_ROWS)
def rows_of_one(count: int) -> RowOwners:
    """Return the owners of ``count`` rows that belong to one layer."""
    return RowOwners([0] * count)


def through_factors(x: Tensor, A: Tensor, V: Tensor) -> Tensor:
    """Return ``(x Vᵀ) Aᵀ`` for ``x [..., in]``, ``A [out, rank]``, ``V [rank, in]``."""
    return linear(linear(x, V), A)


def dequantize_vectors(vectors: Vectors, group_size: int) -> Tensor:
    """Return what quantized vectors stand for, fp32 ``[r, n]``."""
    if vectors.scales is None or vectors.zero_points is None:
        return vectors.codes.float()
    scales = vectors.scales.float()
    return dequantize_groups(vectors.codes, scales, vectors.zero_points, group_size)


def group_bits(
    in_features: int, out_features: int, rank: int, num_bits: int, group_size: int
) -> int:
    """Return the stored bits of a group of ``rank`` triplets at ``num_bits``, σ included.

    Codes, scales and zero points of both factors count, each tensor padded to whole bytes.
    """
    bits = 16 * rank
    for length in (in_features, out_features):
        if num_bits == UNQUANTIZED:
            bits += 16 * rank * length
            continue
        num_scales = rank * -(-length // group_size)
        bits += 8 * (packed_size(rank * length, num_bits) + packed_size(num_scales, num_bits))
        bits += 16 * num_scales
    return bits
