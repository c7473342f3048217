"""Sizes of codebooks: true bits, expected error, one budget over many matrices."""

import itertools

import pytest
import torch

from llmpress.methods.base import Shape
from llmpress.methods.cluscomp.budget import (
    RATE_LOSS,
    CodebookSize,
    allocate,
    choose_codebook_size,
    expected_error,
    frontier,
    smallest_true_bits,
    true_bits,
)
from llmpress.nn.kernels.kmeans import kmeans

BOTH = ("int8", "float16")
SHAPES = [Shape(576, 576), Shape(192, 576), Shape(1536, 576), Shape(576, 1536), Shape(4096, 11008)]
BLOCK = {"q": Shape(576, 576), "v": Shape(192, 576), "up": Shape(1536, 576)}
ALIKE = {"q": 1.0, "v": 1.0, "up": 1.0}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.out_features}x{s.in_features}")
@pytest.mark.parametrize("bits", [1.2, 2.2, 3.0, 4.3])
def test_chosen_codebooks_stay_within_the_bits_and_use_them(shape: Shape, bits: float) -> None:
    used = true_bits(shape, choose_codebook_size(shape, bits))
    assert 0.8 * bits < used <= bits


def test_an_unreachable_budget_names_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"bits=0\.2: .* \d\.\d+ bits"):
        choose_codebook_size(Shape(12, 12), 0.2)


def test_large_matrices_get_longer_vectors_than_small_ones() -> None:
    small, large = (choose_codebook_size(s, 2.5) for s in (Shape(128, 128), Shape(8192, 8192)))
    assert large.vector_size > small.vector_size


@pytest.mark.parametrize("size", [CodebookSize(16, 2), CodebookSize(64, 3), CodebookSize(256, 4)])
def test_the_expected_error_is_what_kmeans_leaves_on_gaussian_weights(size: CodebookSize) -> None:
    vectors = torch.randn(40 * size.num_entries + 20_000, size.vector_size)
    centroids, codes = kmeans(vectors, size.num_entries, iterations=10)
    error = float((vectors - centroids[codes]).square().mean())
    assert error == pytest.approx(expected_error(size), rel=0.08)


@pytest.mark.parametrize("d", RATE_LOSS)
def test_more_entries_never_leave_a_larger_error(d: int) -> None:
    errors = [expected_error(CodebookSize(1 << bits, d)) for bits in range(1, 17)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.out_features}x{s.in_features}")
def test_the_frontier_is_convex(shape: Shape) -> None:
    sizes = frontier(shape, BOTH, scaled=True)
    points = [(true_bits(shape, s), expected_error(s)) for s in sizes]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    assert points[0][0] == smallest_true_bits(shape, BOTH, scaled=True)


@pytest.mark.parametrize("bits", [0.9, 2.2, 2.6, 3.3, 4.3])
def test_the_budget_is_kept_and_used(bits: float) -> None:
    sizes = allocate(BLOCK, ALIKE, bits)
    weights = {name: s.out_features * s.in_features for name, s in BLOCK.items()}
    used = sum(true_bits(BLOCK[n], sizes[n]) * weights[n] for n in BLOCK) / sum(weights.values())
    assert 0.9 * bits < used <= bits


def test_sensitive_matrices_get_more_bits() -> None:
    even = allocate(BLOCK, {"q": 3.0, "v": 1.0, "up": 8.0}, 2.5)
    uneven = allocate(BLOCK, {"q": 3.0, "v": 50.0, "up": 8.0}, 2.5)
    assert true_bits(BLOCK["v"], uneven["v"]) > true_bits(BLOCK["v"], even["v"]) + 1


def test_no_matrix_is_lost_however_little_it_is_felt() -> None:
    sizes = allocate(BLOCK, {"q": 1e-9, "v": 1.0, "up": 8.0}, 2.4)
    assert true_bits(BLOCK["q"], sizes["q"]) > 0.7
    assert expected_error(sizes["q"]) < 0.5


def test_no_exchange_between_two_matrices_does_better() -> None:
    """The allocation beats every other one from the frontiers that costs no more."""
    shapes = {name: BLOCK[name] for name in ("q", "v")}
    sensitivity = {"q": 2.0, "v": 5.0}

    def cost(sizes: dict[str, CodebookSize]) -> float:
        return sum(
            true_bits(s, sizes[n]) * s.out_features * s.in_features for n, s in shapes.items()
        )

    def loss(sizes: dict[str, CodebookSize]) -> float:
        return sum(sensitivity[n] * expected_error(sizes[n]) for n in shapes)

    chosen = allocate(shapes, sensitivity, 2.4)
    for q in frontier(shapes["q"], BOTH, scaled=True):
        for v in frontier(shapes["v"], BOTH, scaled=True):
            if min(true_bits(shapes["q"], q), true_bits(shapes["v"], v)) < 1.0:
                continue
            other = {"q": q, "v": v}
            if cost(other) <= cost(chosen):
                assert loss(other) >= loss(chosen) * (1 - 1e-9)


def test_a_budget_too_small_for_all_names_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"0\.\d{4} bits"):
        allocate(BLOCK, ALIKE, 0.01)
