import itertools

import numpy as np
import pytest
import torch

from llmpress.core.errors import NumericalError
from llmpress.methods.delta_come.budget import (
    best_sizes,
    distortion,
    expected_best_ranks,
    expected_error,
)


@pytest.mark.parametrize("seed", range(5))
def test_the_program_over_all_matrices_finds_the_best_choice(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"layer-{index}" for index in range(4)]
    errors = {name: sorted(random.random(4), reverse=True) for name in names}
    costs = {name: sorted(int(cost) for cost in random.integers(1, 100, 4)) for name in names}
    budget = int(1.5 * sum(cost[0] for cost in costs.values())) + 20

    def total(choice: tuple[int, ...]) -> tuple[float, int]:
        pairs = list(zip(names, choice, strict=True))
        return sum(errors[n][i] for n, i in pairs), sum(costs[n][i] for n, i in pairs)

    possible = [total(choice) for choice in itertools.product(range(4), repeat=4)]
    least = min(error for error, cost in possible if cost <= budget)
    chosen = best_sizes(errors, costs, budget)
    error, cost = total(tuple(chosen[name] for name in names))
    assert cost <= budget
    assert error == pytest.approx(least, rel=2e-4)


def test_an_impossible_budget_and_broken_errors_are_refused() -> None:
    with pytest.raises(NumericalError, match="5 bits"):
        best_sizes({"a": [1.0, 0.5]}, {"a": [10, 20]}, 5)
    with pytest.raises(NumericalError, match="not finite"):
        best_sizes({"a": [float("nan")]}, {"a": [1]}, 5)


def test_the_expected_error_is_what_is_left_of_each_triplet() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0])
    left = [0.1, 0.3]
    assert expected_error(values, [1, 2], left) == pytest.approx(8 * 0.1 + (4 + 2) * 0.3 + 1)
    assert expected_error(values, [0, 0], left) == 15


@pytest.mark.parametrize(("num_bits", "group_size"), [(2, 128), (3, 128), (3, 64), (8, 192)])
def test_a_distortion_is_that_of_the_grid_in_use(num_bits: int, group_size: int) -> None:
    groups = np.random.default_rng(1).standard_normal((8192, group_size))
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = (high - low) / (2**num_bits - 1)
    zero = np.rint(-low / step)
    rounded = step * (np.clip(np.rint(groups / step) + zero, 0, 2**num_bits - 1) - zero)
    expected = np.square(groups - rounded).mean()
    found = distortion(num_bits, group_size, search=False)
    assert found == pytest.approx(expected, rel=0.02)
    assert (num_bits == 8) or distortion(num_bits, group_size, search=True) < 0.95 * found


@pytest.mark.parametrize("budget", [500, 900, 1500, 3100])
def test_no_other_ranks_that_cost_as_little_are_better(budget: int) -> None:
    values = torch.arange(1, 13, dtype=torch.float64) ** -1.2
    costs, left = [320, 170, 90], [0.0001, 0.02, 0.4]

    def cost(ranks: tuple[int, ...]) -> int:
        return sum(rank * price for rank, price in zip(ranks, costs, strict=True))

    mine = expected_best_ranks(values, budget, costs, left)
    spent = cost(tuple(mine))
    assert budget - costs[0] < spent <= budget
    possible = [r for r in itertools.product(range(13), repeat=3) if sum(r) <= 12]
    best = min(expected_error(values, r, left) for r in possible if cost(r) <= spent)
    assert expected_error(values, mine, left) == pytest.approx(best)
