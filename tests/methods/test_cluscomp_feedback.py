"""Error feedback over vectors, against brute force and dense solutions in fp64."""

import itertools

import pytest
import torch
from torch import Tensor

from llmpress.methods.cluscomp.feedback import (
    Assignment,
    assign_with_feedback,
    improve_codes,
    refit_codebook,
)
from llmpress.numerics.error_feedback import feed_errors_back
from llmpress.numerics.linalg import damped_inverse_cholesky

IN, GROUPS, D, K = 150, 6, 3, 16  # more channels than fit one block


class Problem:
    """A matrix whose inputs are correlated, and the loss it is rounded for."""

    def __init__(self, count: int = IN) -> None:
        inputs = torch.randn(4 * count, count // 3 + 1) @ torch.randn(count // 3 + 1, count)
        inputs += 0.3 * torch.randn(4 * count, count)
        self.moment = inputs.t() @ inputs / len(inputs)
        self.moment.diagonal().add_(0.01 * self.moment.diagonal().mean())
        self.columns = torch.randn(count, GROUPS * D)
        self.importance = torch.rand(GROUPS * D) + 0.1
        self.codebook = torch.randn(K, D)

    def loss(self, codebook: Tensor, codes: Tensor) -> float:
        error = (self.columns - codebook[codes].view(len(codes), -1)).double()
        return float(((self.moment.double() @ error) * error).sum(dim=0) @ self.importance.double())

    def nearest(self) -> Tensor:
        assign = Assignment(self.codebook, self.importance)
        return torch.stack([assign(channel) for channel in self.columns])

    def with_feedback(self) -> Tensor:
        order = self.moment.diagonal().argsort(descending=True)
        factor = damped_inverse_cholesky(self.moment[order][:, order], 0.0).factor
        return assign_with_feedback(self.columns, self.codebook, self.importance, factor, order)


def test_the_nearest_entry_is_the_nearest_by_importance() -> None:
    problem = Problem(3)
    distance = (problem.columns.view(3, GROUPS, 1, D) - problem.codebook).square()
    weighted = (distance * problem.importance.view(GROUPS, 1, D)).sum(dim=-1)
    torch.testing.assert_close(problem.nearest(), weighted.argmin(dim=-1))


def test_feedback_and_improvement_lower_the_loss() -> None:
    problem = Problem()
    plain = problem.loss(problem.codebook, problem.nearest())
    codes = problem.with_feedback()
    fed_back = problem.loss(problem.codebook, codes)
    assert fed_back < 0.7 * plain
    previous = fed_back
    for _ in range(3):
        codes = improve_codes(
            problem.columns, problem.codebook, codes, problem.importance, problem.moment
        )
        now = problem.loss(problem.codebook, codes)
        assert now < previous
        previous = now


def test_feedback_on_a_grid_is_gptq() -> None:
    """Entries -1.5, -0.5, 0.5, 1.5 with d = 1 are a 2-bit grid."""
    problem = Problem()
    order = torch.arange(IN)
    factor = damped_inverse_cholesky(problem.moment, 0.0).factor
    grid = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
    codes = assign_with_feedback(problem.columns, grid, torch.ones(GROUPS * D), factor, order)
    ones = torch.ones_like(problem.columns)
    expected = feed_errors_back(problem.columns.clone(), factor, ones, 1.5 * ones, 2)
    assert float((codes == expected).float().mean()) > 0.999  # ties and rounding apart


def test_an_improved_code_is_the_best_one_with_all_others_fixed() -> None:
    problem = Problem(5)
    codes = problem.nearest()
    better = improve_codes(
        problem.columns, problem.codebook, codes, problem.importance, problem.moment
    )
    by_hand = codes.clone()
    for channel, group in itertools.product(range(5), range(GROUPS)):
        losses = []
        for entry in range(K):
            by_hand[channel, group] = entry
            losses.append(problem.loss(problem.codebook, by_hand))
        by_hand[channel, group] = int(torch.tensor(losses).argmin())
    torch.testing.assert_close(better, by_hand)


@pytest.mark.parametrize("iterations", [1, 60])
def test_the_refitted_codebook_solves_the_normal_equations(iterations: int) -> None:
    problem = Problem(40)
    codes = problem.nearest()
    fitted = refit_codebook(
        problem.columns, problem.codebook, codes, problem.importance, problem.moment, iterations
    )
    assert problem.loss(fitted, codes) < problem.loss(problem.codebook, codes)
    if iterations == 1:
        return
    used = torch.zeros(K, dtype=torch.bool).index_fill_(0, codes.view(-1), True)
    torch.testing.assert_close(fitted[~used], problem.codebook[~used])
    exact = problem.codebook.double()
    for j in range(D):
        normal = torch.zeros(K, K, dtype=torch.float64)
        right = torch.zeros(K, dtype=torch.float64)
        for group in range(GROUPS):
            output = group * D + j
            chosen = torch.nn.functional.one_hot(codes[:, group], K).double()  # [in, K]
            weighted = chosen.t() @ problem.moment.double() * problem.importance[output].double()
            normal += weighted @ chosen
            right += weighted @ problem.columns[:, output].double()
        exact[used, j] = torch.linalg.solve(normal[used][:, used], right[used])
    torch.testing.assert_close(fitted.double(), exact, rtol=2e-3, atol=2e-3)
