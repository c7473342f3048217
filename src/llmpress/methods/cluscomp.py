"""ClusComp: k-means codebooks, finetuned block by block.

The weight's transpose ``Wᵀ [in, out]`` is cut into vectors of ``d`` consecutive output channels of
one input channel, ``N = in · ceil(out / d)`` of them, and every vector becomes an index into a
codebook ``[K, d]``.

Source: ClusComp, arXiv 2503.13089, and its authors' code. Deviations: K and d are chosen from a
target of true bits (the paper fixes K = 65500, too large for small matrices); each vector is
weighted
by the second moment of its input channel, as SqueezeLLM, GPTVQ and VPTQ do; the block loss is
relative to the size of each token's output, because a few massive activations otherwise hold nearly
all of a plain squared error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from llmpress.kernels.kmeans import kmeans
from llmpress.layers.codebook import CodebookLinear
from llmpress.methods.base import (
    InputStatistics,
    Method,
    Shape,
    Term,
    Tunable,
    checked_statistics,
    checked_weight,
)

MAX_ENTRIES = 1 << 16
MAX_VECTOR_SIZE = 16
CODEBOOK_BITS = 16


class CodebookSize(NamedTuple):
    """Number of entries ``K`` and length ``d`` of a codebook."""

    num_entries: int
    vector_size: int


@dataclass(frozen=True)
class ClusComp(Method, Tunable):
    """Settings of ClusComp; give ``bits``, or both ``num_entries`` and ``vector_size``.

    Attributes:
        bits: True bits per weight of every matrix, at most: codes, codebook and padding included.
        num_entries: ``K``, the paper's form.
        vector_size: ``d``, the paper's form.
        weighted: Weight vectors by their input channel's second moment, where statistics exist.
        iterations: Lloyd iterations of k-means.
        loss: Block loss: squared error relative to each token's output (default) or plain.
        own_target: Also compare with the original block on the compressed model's hidden states.
    """

    uses_statistics: ClassVar[bool] = True

    bits: float | None = None
    num_entries: int | None = None
    vector_size: int | None = None
    weighted: bool = True
    iterations: int = 20
    loss: Literal["relative_mse", "mse"] = "relative_mse"
    own_target: bool = False

    def __post_init__(self) -> None:
        fixed = self.num_entries is not None and self.vector_size is not None
        partly = self.num_entries is not None or self.vector_size is not None
        if (self.bits is None) != fixed or (self.bits is not None and partly):
            raise ValueError("cluscomp: give either bits, or both num_entries and vector_size")
        if self.bits is not None and not 0.1 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits}: allowed are 0.1 to 16")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: must be positive")

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the bits of the smallest codebook: two entries of the longest vectors."""
        return None if self.bits is None else smallest_true_bits(shape)

    def codebook_size(self, shape: Shape) -> CodebookSize:
        """Return the codebook that a matrix of this shape gets.

        Raises:
            ValueError: No codebook fits the bits; names the smallest possible.
        """
        if self.bits is not None:
            return choose_codebook_size(shape, self.bits)
        if self.num_entries is None or self.vector_size is None:
            raise ValueError("cluscomp: give either bits, or both num_entries and vector_size")
        return CodebookSize(
            min(self.num_entries, _num_vectors(shape, self.vector_size)), self.vector_size
        )

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> CodebookLinear:
        """Cluster the vectors of ``weight [out, in]`` and store codes and codebook."""
        checked = checked_weight(weight)
        out_features, in_features = checked.shape
        K, d = self.codebook_size(Shape(out_features, in_features))
        padded = torch.nn.functional.pad(checked.t(), (0, -out_features % d))
        vectors = padded.reshape(-1, d)  # [N, d]
        vector_weights = None
        if self.weighted and statistics is not None:
            channel = checked_statistics(statistics, checked).diagonal
            floor = channel.mean() * 1e-6  # a dead channel still needs some entry
            vector_weights = (
                channel.clamp(min=float(floor)).repeat_interleave(padded.shape[1] // d)
                / channel.mean()
                if float(channel.mean()) > 0
                else None
            )
        centroids, codes = kmeans(
            vectors, K, weights=vector_weights, iterations=self.iterations, seed=seed
        )
        return CodebookLinear.from_codes(codes, centroids, in_features, out_features)

    def loss_terms(self) -> tuple[Term, ...]:
        """Compressed block on its own chain against the original; optionally on the same inputs."""
        own = (Term("student", "student"),) if self.own_target else ()
        return (Term("student", "teacher"), *own)

    def block_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, relative to each token's mean square unless ``loss`` is ``mse``."""
        error = (output - target).square().mean(dim=-1)
        if self.loss == "mse":
            return error.mean()
        return (error / target.square().mean(dim=-1).clamp(min=1e-12)).mean()


def true_bits(shape: Shape, size: CodebookSize) -> float:
    """Return all stored bits per weight: packed codes with padding, and the codebook in 16 bit."""
    code_bits = max(1, (size.num_entries - 1).bit_length())
    code_bytes = -(-_num_vectors(shape, size.vector_size) * code_bits // 8)
    codebook = CODEBOOK_BITS * size.num_entries * size.vector_size
    return (8 * code_bytes + codebook) / (shape.out_features * shape.in_features)


def smallest_true_bits(shape: Shape) -> float:
    """Return the bits per weight of the smallest codebook there is for a matrix."""
    return min(true_bits(shape, CodebookSize(2, d)) for d in range(1, MAX_VECTOR_SIZE + 1))


def choose_codebook_size(shape: Shape, bits: float) -> CodebookSize:
    """Choose the codebook with the smallest expected error among those within ``bits``.

    Longer vectors win until the codebook eats the budget, which on small matrices is early.
    Of codebooks whose expected errors differ by less than 2 % the smallest one is taken.

    Raises:
        ValueError: No codebook fits; names the smallest number of bits that one needs.
    """
    within = [size for size in _largest_sizes(shape, bits) if true_bits(shape, size) <= bits]
    if not within:
        smallest = smallest_true_bits(shape)
        raise ValueError(
            f"bits={bits}: a matrix of shape {list(shape)} needs at least {smallest:.3f} bits "
            "per weight"
        )
    best = min(expected_error(size) for size in within)
    good = [size for size in within if expected_error(size) <= 1.02 * best]
    return min(good, key=lambda size: (true_bits(shape, size), size.vector_size))


def _largest_sizes(shape: Shape, bits: float) -> Iterator[CodebookSize]:
    """Yield, for each vector and code length, the largest codebook that may fit."""
    budget = bits * shape.out_features * shape.in_features
    for d in range(1, min(MAX_VECTOR_SIZE, shape.out_features) + 1):
        vectors = _num_vectors(shape, d)
        for code_bits in range(1, 17):
            room = budget - 8 * -(-vectors * code_bits // 8)
            K = min(int(room // (CODEBOOK_BITS * d)), 1 << code_bits, vectors, MAX_ENTRIES)
            if K >= 2 and (K - 1).bit_length() == code_bits:
                yield CodebookSize(K, d)


def expected_error(size: CodebookSize) -> float:
    """Return the mean squared error of an optimal quantizer of unit Laplace variables.

    Zador's formula ``G_d · ‖p‖_(d/(d+2)) · K^(-2/d)``, for the density p of d independent ones:
    ``‖p‖ = (2^((1-s)/2) / s)^(d+2)`` with ``s = d / (d + 2)``. Weights times their channel's size
    have heavy tails; with a Gaussian p short vectors look better than they are.
    """
    d = size.vector_size
    # normalised second moment of the best known quantizers: 1/12 for d=1, falling towards 1/(2πe)
    moment = {1: 0.0833, 2: 0.0802, 3: 0.0785, 4: 0.0766, 5: 0.0756, 6: 0.0742, 8: 0.0717}
    nearest = min(moment, key=lambda known: abs(known - d))
    s = d / (d + 2)
    norm = (2 ** ((1 - s) / 2) / s) ** (d + 2)
    error: float = moment[nearest] * norm * size.num_entries ** (-2 / d)
    return error


def _num_vectors(shape: Shape, vector_size: int) -> int:
    return shape.in_features * -(-shape.out_features // vector_size)
