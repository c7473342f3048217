"""Lillama: the best start for given activations and loss, storage, the loss of the paper."""

import math
from dataclasses import replace

import pytest
import torch
from method_examples import Example
from torch import Tensor

from llmpress.methods.base import InputStatistics, Shape, Term
from llmpress.methods.lillama import Lillama
from llmpress.methods.lillama.budget import candidate_ranks, num_stored
from llmpress.numerics.linalg import relative_output_error
from llmpress.numerics.low_rank import (
    OutputDirections,
    output_energy,
    output_factors,
    weight_factors,
)

EXAMPLES = [
    Example({"rank": 3}, needs_statistics=True),
    Example({"rank": 8, "start": "weights"}),
    Example({"rank": 5, "start": "activations", "form": "factors"}, needs_statistics=True),
]
LADDERS = [[{"rank": r, "form": form} for r in (1, 4, 16, 48)] for form in ("pivoted", "factors")]
BETTER_THAN = [
    ({"rank": 16}, "svd", {"rank": 16}),
]

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
    A, B = output_factors(weight, moment, 6)
    root = torch.linalg.cholesky(moment.double() + 1e-9 * torch.eye(shape[1]))
    sigma = torch.linalg.svdvals(weight.double() @ root)
    expected = float(sigma[6:].square().sum() / sigma.square().sum())
    assert relative_output_error(weight, A @ B, moment) == pytest.approx(expected, rel=1e-3)
    assert relative_output_error(weight, A @ B, moment) < 0.9 * relative_output_error(
        weight, torch.matmul(*weight_factors(weight, 6)), moment
    )


def test_a_singular_second_moment_is_no_problem() -> None:
    weight, moment = torch.randn(24, 40), correlated(40, 5)
    A, B = output_factors(weight, moment, 5)
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    assert relative_output_error(weight, A @ B, moment) < 1e-6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_weighted_outputs_are_the_optimum_for_their_weights(shape: tuple[int, int]) -> None:
    weight, moment = torch.randn(shape), correlated(shape[1], 64)
    importance = torch.rand(shape[0]).square() + 0.01
    A, B = output_factors(weight, moment, 6, importance)
    root = importance.double().sqrt().unsqueeze(1)
    whitened = torch.linalg.cholesky(moment.double() + 1e-9 * torch.eye(shape[1]))
    sigma = torch.linalg.svdvals(root * weight.double() @ whitened)
    error = root * (weight - A @ B).double()
    assert float((error @ moment.double() * error).sum()) == pytest.approx(
        float(sigma[6:].square().sum()), rel=1e-3
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("directions", [5, 64])
def test_directions_are_orthonormal_and_hold_all_energy(
    shape: tuple[int, int], directions: int
) -> None:
    weight, moment = torch.randn(shape), correlated(shape[1], directions)
    found = OutputDirections(weight, moment)
    energy, vectors = found.energy, found.leading(24)
    torch.testing.assert_close(output_energy(weight, moment), energy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vectors.t() @ vectors, torch.eye(24).double())
    outputs = weight.double() @ moment.double() @ weight.double().t()
    assert float(energy.sum()) == pytest.approx(float(outputs.trace()))
    torch.testing.assert_close(
        (vectors.t() @ outputs @ vectors).diagonal(),
        energy,
        rtol=1e-6,
        atol=1e-5 * float(energy[0]),
    )
    torch.testing.assert_close(
        found.leading(4) @ found.leading(4).t(), vectors[:, :4] @ vectors[:, :4].t()
    )


@pytest.mark.parametrize("felt", [True, False])
def test_the_sensitivity_is_the_loss_of_each_candidate_rank(felt: bool) -> None:
    weight, moment = torch.randn(40, 64), correlated(64, 100)
    importance = torch.rand(40) + 0.1
    statistics = InputStatistics(moment, 400, importance if felt else None)
    method = Lillama(reduction=0.5, rank_step=8)
    losses = method.sensitivity(weight, statistics)
    ranks = candidate_ranks(Shape(40, 64), 8, "pivoted")
    assert len(losses) == len(ranks) == 4
    weights = importance if felt else torch.ones(40)

    def loss(error: Tensor) -> float:
        return float(((error @ moment) * error).sum(dim=1) @ weights)

    unit = 1.0 if felt else weight.numel() / loss(weight)
    for rank, expected in zip(ranks, losses, strict=True):
        layer = Lillama(rank=rank).compress(weight, statistics)
        error = weight - layer.dequantize()
        assert loss(error) * unit == pytest.approx(expected, rel=0.02)  # stored in bf16


def test_a_layer_that_the_loss_does_not_feel_costs_nothing() -> None:
    statistics = InputStatistics(correlated(64, 100), 400, torch.zeros(40))
    losses = Lillama(reduction=0.5).sensitivity(torch.randn(40, 64), statistics)
    assert losses == [0.0] * 4


def test_both_forms_stand_for_the_same_matrix() -> None:
    weight, statistics = torch.randn(40, 64), InputStatistics(correlated(64, 100), 400)
    factors = Lillama(rank=16, form="factors").compress(weight, statistics)
    pivoted = Lillama(rank=16).compress(weight, statistics)
    scale = float(weight.abs().max())
    torch.testing.assert_close(
        pivoted.dequantize(), factors.dequantize(), rtol=0, atol=0.02 * scale
    )
    assert factors.stored_bits() == 16 * num_stored(Shape(40, 64), 16, "factors")
    assert pivoted.stored_bits() == 16 * num_stored(Shape(40, 64), 16, "pivoted")


def test_factors_have_equal_norms() -> None:
    A, B = output_factors(torch.randn(24, 40), correlated(40, 64), 8)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))


def test_full_rank_svd_is_exact() -> None:
    weight = torch.randn(9, 14)
    torch.testing.assert_close(
        torch.matmul(*weight_factors(weight, 9)), weight, atol=1e-5, rtol=1e-5
    )


def test_only_a_budget_without_a_given_spread_is_spread_by_loss() -> None:
    assert Lillama(reduction=0.1).spreads_budget
    assert not Lillama(reduction=0.1, strategy="uniform").spreads_budget
    assert not Lillama(rank=8).spreads_budget


def test_ranks_go_where_they_are_needed() -> None:
    method = Lillama(reduction=0.2, rank_step=8)
    candidates = {n: len(candidate_ranks(s, 8, "pivoted")) for n, s in SHAPES.items()}
    losses = {n: [1.0 / (i + 1) for i in range(count)] for n, count in candidates.items()}
    losses["layers.2.up"] = [1e4 * x for x in losses["layers.2.up"]]
    plan = method.plan(SHAPES, MODEL_WEIGHTS, losses)
    assert plan["layers.2.up"] is None
    without = method.plan(SHAPES, MODEL_WEIGHTS)
    uniform = replace(method, strategy="uniform").plan(SHAPES, MODEL_WEIGHTS)
    assert {n: m and m.rank for n, m in without.items()} == {
        n: m and m.rank for n, m in uniform.items()
    }


def test_a_rank_that_would_enlarge_a_matrix_leaves_it_dense() -> None:
    plan = Lillama(rank=20, form="factors").plan(SHAPES, MODEL_WEIGHTS)
    assert plan["layers.0.k"] is None
    assert plan["layers.0.up"].rank == 20
    plan = Lillama(rank=16).plan(SHAPES, MODEL_WEIGHTS)
    assert plan["layers.0.k"] is None
    assert plan["layers.0.q"].rank == 16


@pytest.mark.parametrize("strategy", ["loss", "uniform", "bottom"])
def test_an_unreachable_reduction_names_the_largest(strategy: str) -> None:
    with pytest.raises(ValueError, match=r"reduction=0\.9.: .* 0\.\d+"):
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
    with pytest.raises(ValueError, match="statistics"):
        Lillama(rank=2).compress(torch.randn(8, 8))
    statistics = InputStatistics(torch.eye(8), 10)
    assert Lillama(rank=2).compress(torch.randn(8, 8), statistics).rank == 2
