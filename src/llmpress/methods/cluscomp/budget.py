"""Sizes of codebooks: what one costs, what error it leaves, and one budget spread over many.

Dimensions: a weight ``[out, in]`` is cut into ``N = in · ceil(out / d)`` vectors of ``d``
consecutive output channels; a codebook has ``K`` entries of ``d`` values.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import ceil, log2
from typing import NamedTuple

from llmpress.methods.base import Shape
from llmpress.nn.packing import code_width

SCALE_BITS = 16
MAX_CODE_BITS = 16
VALUE_BITS = {"int8": 8, "float16": 16}
INT8_NOISE = (5.0 / 127) ** 2 / 12
"""Squared rounding error of a codebook in int8 over the mean square of its entries, which reach
about five times their root mean square."""

LEAST_SHARE = 0.5
"""Of the budget's bits per weight, for every matrix: that the loss rises in proportion to the error
holds for small errors only, and a matrix that is hardly felt must not be lost altogether."""

RATE_LOSS: Mapping[int, tuple[float, ...]] = {
    1: (0.27, 0.46, 0.57, 0.64, 0.68),
    2: (0.22, 0.27, 0.38, 0.44, 0.47, 0.50, 0.52, 0.55),
    3: (0.20, 0.21, 0.26, 0.30, 0.33, 0.36, 0.38, 0.39, 0.40),
    4: (0.18, 0.18, 0.19, 0.23, 0.27, 0.29, 0.30, 0.31),
    5: (0.17, 0.17, 0.18, 0.19, 0.21, 0.24, 0.25, 0.25),
    6: (0.15, 0.15, 0.16, 0.18, 0.19, 0.20, 0.21, 0.22),
    8: (0.13, 0.13, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18),
    12: (0.11, 0.11, 0.11, 0.11, 0.11, 0.11, 0.12, 0.12),
    16: (0.09, 0.09, 0.09, 0.09, 0.09, 0.09, 0.09, 0.10),
}
"""Bits per weight by which k-means on ``d`` Gaussian variables stays behind the rate-distortion
bound ``2^(-2 R)``, for codes of 1, 2, 3, ... bits (d = 1: Lloyd and Max); the last one stands for
all longer codes. Measured where a code is worth half a bit per weight or more, rounded along the
trend; set along it below that, and at the longest codes of d = 8 and above, see
docs/methods/cluscomp.md."""


class CodebookSize(NamedTuple):
    """Number of entries ``K``, their length ``d``, and how their values are stored."""

    num_entries: int
    vector_size: int
    dtype: str = "float16"

    @property
    def code_bits(self) -> int:
        """Bits of one stored code."""
        return code_width(self.num_entries)


def num_vectors(shape: Shape, vector_size: int) -> int:
    """Return ``N``: vectors of a matrix, the padded ones included."""
    return shape.in_features * ceil(shape.out_features / vector_size)


def true_bits(shape: Shape, size: CodebookSize, *, scaled: bool = True) -> float:
    """Return all stored bits per weight: packed codes with padding, codebook and scales."""
    code_bytes = ceil(num_vectors(shape, size.vector_size) * size.code_bits / 8)
    codebook = VALUE_BITS[size.dtype] * size.num_entries * size.vector_size
    scales = SCALE_BITS * shape.out_features if scaled else 0
    return (8 * code_bytes + codebook + scales) / (shape.out_features * shape.in_features)


def expected_error(size: CodebookSize) -> float:
    """Return the mean squared error that is expected on Gaussian weights of unit variance."""
    losses = RATE_LOSS[size.vector_size]
    loss = losses[min(size.code_bits, len(losses)) - 1]
    rate = log2(size.num_entries) / size.vector_size
    noise = INT8_NOISE if size.dtype == "int8" else 0.0
    return float(2.0 ** (-2 * (rate - loss))) + noise


@lru_cache(maxsize=1024)
def frontier(shape: Shape, dtypes: tuple[str, ...], scaled: bool) -> tuple[CodebookSize, ...]:
    """Return the sizes worth having, from the smallest to the most exact.

    They are the lower convex hull of expected error against true bits: between any two of them
    no size does better than their mixture.
    """
    sizes = sorted(
        _sizes(shape, dtypes),
        key=lambda s: (true_bits(shape, s, scaled=scaled), expected_error(s)),
    )
    hull: list[tuple[float, float, CodebookSize]] = []
    for size in sizes:
        bits, error = true_bits(shape, size, scaled=scaled), expected_error(size)
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (bits, error)):
            hull.pop()
        hull.append((bits, error, size))
    return tuple(size for _, _, size in hull)


def choose_codebook_size(
    shape: Shape, bits: float, dtypes: tuple[str, ...] = ("int8", "float16"), scaled: bool = True
) -> CodebookSize:
    """Choose the codebook with the smallest expected error among those within ``bits``.

    Raises:
        ValueError: No codebook fits; names the smallest number of bits that one needs.
    """
    within = [s for s in _sizes(shape, dtypes) if true_bits(shape, s, scaled=scaled) <= bits]
    if not within:
        smallest = smallest_true_bits(shape, dtypes, scaled)
        raise ValueError(
            f"bits={bits}: a matrix of shape {list(shape)} needs at least {smallest:.3f} bits "
            "per weight"
        )
    return min(within, key=lambda s: (expected_error(s), true_bits(shape, s, scaled=scaled)))


def smallest_true_bits(shape: Shape, dtypes: tuple[str, ...], scaled: bool) -> float:
    """Return the bits per weight of the smallest codebook there is for a matrix."""
    return min(true_bits(shape, s, scaled=scaled) for s in _sizes(shape, dtypes))


def allocate(
    shapes: Mapping[str, Shape],
    sensitivity: Mapping[str, float],
    bits: float,
    dtypes: tuple[str, ...] = ("int8", "float16"),
    scaled: bool = True,
) -> dict[str, CodebookSize]:
    """Spread ``bits`` per weight over all matrices where they lower the loss most.

    Minimises ``Σ sensitivity · expected_error`` under one budget of true bits: every matrix starts
    with the largest codebook of its frontier within half of the budget's bits per weight, then the
    step along some matrix's frontier that lowers the loss most per bit is taken, for as long as one
    fits.

    Args:
        shapes: The matrices by name.
        sensitivity: Rise of the loss per unit of relative error of each matrix.
        bits: True bits per weight over all matrices, at most.
        dtypes: Of the codebooks.
        scaled: Whether each output channel has a scale.

    Raises:
        ValueError: The smallest codebooks need more; names the number of bits.
    """
    steps, chosen, spent = [], {}, 0.0
    for order, (name, shape) in enumerate(shapes.items()):
        sizes = frontier(shape, dtypes, scaled)
        weights = shape.out_features * shape.in_features
        affordable = [s for s in sizes if true_bits(shape, s, scaled=scaled) <= LEAST_SHARE * bits]
        sizes = sizes[max(0, len(affordable) - 1) :]
        points = [(true_bits(shape, s, scaled=scaled) * weights, expected_error(s)) for s in sizes]
        chosen[name] = sizes[0]
        spent += points[0][0]
        for (cost, error), (next_cost, next_error), size in zip(
            points, points[1:], sizes[1:], strict=False
        ):
            gain = sensitivity[name] * (error - next_error)
            steps.append((-gain / (next_cost - cost), order, next_cost - cost, name, size))
    total = sum(shape.out_features * shape.in_features for shape in shapes.values())
    budget = bits * total
    if spent > budget:
        raise ValueError(
            f"bits={bits}: the smallest possible budget here is "
            f"{ceil(1e4 * spent / total) / 1e4:.4f} bits per weight"
        )
    full: set[str] = set()
    for _, _, cost, name, size in sorted(steps, key=lambda step: step[:2]):
        if name in full or spent + cost > budget:
            full.add(name)  # a later step of this matrix starts where this one would have ended
            continue
        chosen[name] = size
        spent += cost
    return chosen


def _sizes(shape: Shape, dtypes: tuple[str, ...]) -> Iterator[CodebookSize]:
    """Yield every size with full codes whose codebook has no more entries than vectors."""
    for d in RATE_LOSS:
        if d <= shape.out_features:
            for code_bits in range(1, MAX_CODE_BITS + 1):
                if 1 << code_bits <= num_vectors(shape, d):
                    for dtype in dtypes:
                        yield CodebookSize(1 << code_bits, d, dtype)


def _slope(
    point: tuple[float, float, CodebookSize] | tuple[float, float],
    other: tuple[float, float, CodebookSize] | tuple[float, float],
) -> float:
    """Return the error saved per bit between two points, as a positive number."""
    return (point[1] - other[1]) / (other[0] - point[0])
