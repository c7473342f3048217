"""Lillama: the best start for given activations, ranks under a budget, the loss of the paper."""

import math

import pytest
import torch
from torch import Tensor

from llmpress.linalg import relative_output_error
from llmpress.methods.base import InputStatistics, Shape, Term
from llmpress.methods.lillama import Lillama, activation_factors, svd_factors

SHAPES = {
    f"layers.{i}.{name}": shape
    for i in range(6)
    for name, shape in {"q": Shape(64, 64), "k": Shape(16, 64), "up": Shape(160, 64)}.items()
}
BLOCK_WEIGHTS = sum(s.out_features * s.in_features for s in SHAPES.values())
MODEL_WEIGHTS = BLOCK_WEIGHTS + 5000


def correlated(features: int, rank: int) -> Tensor:
    x = torch.randn(400, rank) @ torch.randn(rank, features)
    return x.t() @ x / 400


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_start_is_the_optimum_for_the_activations(shape: tuple[int, int]) -> None:
    weight, moment = torch.randn(shape), correlated(shape[1], 64)
    A, B = activation_factors(weight, moment, 6)
    root = torch.linalg.cholesky(moment.double() + 1e-9 * torch.eye(shape[1]))
    sigma = torch.linalg.svdvals(weight.double() @ root)
    expected = float(sigma[6:].square().sum() / sigma.square().sum())
    assert relative_output_error(weight, A @ B, moment) == pytest.approx(expected, rel=1e-3)
    assert relative_output_error(weight, A @ B, moment) < 0.9 * relative_output_error(
        weight, torch.matmul(*svd_factors(weight, 6)), moment
    )


def test_a_singular_second_moment_is_no_problem() -> None:
    weight, moment = torch.randn(24, 40), correlated(40, 5)
    A, B = activation_factors(weight, moment, 5)
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    assert relative_output_error(weight, A @ B, moment) < 1e-6


def test_factors_have_equal_norms() -> None:
    A, B = activation_factors(torch.randn(24, 40), correlated(40, 64), 8)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))


def test_full_rank_svd_is_exact() -> None:
    weight = torch.randn(9, 14)
    torch.testing.assert_close(torch.matmul(*svd_factors(weight, 9)), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["uniform", "bottom", "top"])
@pytest.mark.parametrize("reduction", [0.1, 0.2, 0.3])
def test_the_budget_is_met_and_hardly_exceeded(strategy: str, reduction: float) -> None:
    method = Lillama(reduction=reduction, strategy=strategy, rank_step=2)
    plan = method.plan(SHAPES, MODEL_WEIGHTS)
    kept = sum(
        s[0] * s[1] if m is None else m.rank * (s[0] + s[1])
        for s, m in zip(SHAPES.values(), plan.values(), strict=True)
    )
    assert reduction <= (BLOCK_WEIGHTS - kept) / MODEL_WEIGHTS < reduction + 0.03


def test_bottom_and_top_leave_the_other_end_alone() -> None:
    bottom = Lillama(reduction=0.1, strategy="bottom", rank_step=2).plan(SHAPES, MODEL_WEIGHTS)
    top = Lillama(reduction=0.1, strategy="top", rank_step=2).plan(SHAPES, MODEL_WEIGHTS)
    names = list(SHAPES)
    assert bottom[names[0]] is not None
    assert bottom[names[-1]] is None
    assert top[names[0]] is None
    assert top[names[-1]] is not None


def test_a_rank_that_would_enlarge_a_matrix_leaves_it_dense() -> None:
    plan = Lillama(rank=20).plan(SHAPES, MODEL_WEIGHTS)
    assert plan["layers.0.k"] is None
    assert plan["layers.0.up"].rank == 20


@pytest.mark.parametrize("strategy", ["uniform", "bottom"])
def test_an_unreachable_reduction_names_the_largest(strategy: str) -> None:
    with pytest.raises(ValueError, match=r"reduction=0\.9.: at most 0\.\d+"):
        Lillama(reduction=0.99, strategy=strategy).plan(SHAPES, MODEL_WEIGHTS)


def test_the_loss_is_the_papers() -> None:
    output, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    per_token = []
    for a, y in zip(output.reshape(-1, 8), target.reshape(-1, 8), strict=True):
        cosine = float(a @ y / (a.norm() * y.norm()))
        per_token.append(float((a - y).abs().mean()) + math.log1p(math.exp(-cosine)))
    expected = sum(per_token) / len(per_token)
    assert float(Lillama(rank=2).block_loss(output, target)) == pytest.approx(expected, rel=1e-5)


def test_modes_choose_the_students_inputs() -> None:
    teacher, student = Term("teacher", "teacher"), Term("student", "teacher")
    assert Lillama(rank=2).loss_terms() == (teacher, student)
    assert Lillama(rank=2, mode="teacher").loss_terms() == (teacher,)
    assert Lillama(rank=2, mode="student").loss_terms() == (student,)


def test_the_default_start_needs_statistics() -> None:
    with pytest.raises(ValueError, match="needs calibration statistics"):
        Lillama(rank=2).compress(torch.randn(8, 8))
    statistics = InputStatistics(torch.eye(8), 10)
    assert Lillama(rank=2).compress(torch.randn(8, 8), statistics).rank == 2
