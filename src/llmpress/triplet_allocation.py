"""How many bits each singular triplet of a delta gets, within a matrix and over all matrices.

A triplet of variance ``λ`` stored at ``b`` bits is expected to leave ``λ (1 - (1 - d_b)²)`` of the
outputs' error, ``d_b`` the distortion of a normal variable at ``b`` bits, and ``λ`` when it is
dropped: rounding ``v`` keeps ``1 - d_b`` of it, rounding ``u`` the same share of that. Source: the
error in the space of singular vectors and the 0/1 program are PrinMix's, arXiv 2506.11087.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from llmpress.errors import NumericalError

GAUSSIAN_DISTORTION = (1, 0.648, 0.136, 0.0349, 0.00913, 0.00229, 0.000575, 0.000142, 0.0000352)
"""Mean squared rounding error of standard normal numbers at 0 to 8 bits, 128 to a searched grid."""

FP16_DISTORTION = 5e-9

OPTIMALITY_GAP = 1e-4
"""Relative distance from the optimum at which the program over all matrices is solved."""


def errors_left(precisions: Sequence[int]) -> Tensor:
    """Return the share of a triplet's variance that each precision leaves, fp64."""
    distortion = [GAUSSIAN_DISTORTION[b] if b <= 8 else FP16_DISTORTION for b in precisions]
    return torch.tensor([1 - (1 - d) ** 2 for d in distortion], dtype=torch.float64)


def expected_error(values: Tensor, ranks: Sequence[int], precisions: Sequence[int]) -> float:
    """Return the error that is expected to be left, in the unit of the variances.

    Args:
        values: ``λ``, falling.
        ranks: How many triplets, from the first on, have each precision.
        precisions: Bits.
    """
    values = values.double().cpu()
    shares = torch.repeat_interleave(errors_left(precisions), torch.tensor(ranks))
    stored = len(shares)
    return float((values[:stored] * shares).sum() + values[stored:].sum())


def expected_best_ranks(values: Tensor, budget: int, costs: Mapping[int, int]) -> list[int]:
    """Return how many triplets to store at each precision for the least expected error.

    The 0/1 program of one matrix, a precision or none for each triplet, is solved by the multiplier
    ``μ`` of ``error + μ · cost``: the optimum for what it spends, which is less than one triplet
    below the budget.

    Args:
        values: ``λ``, falling.
        budget: Bits.
        costs: Bits of one triplet at each precision, precisions falling.
    """
    errors = torch.cat([torch.ones(1, dtype=torch.float64), errors_left(list(costs))])
    prices = torch.tensor([0, *costs.values()], dtype=torch.float64)
    values = values.double().cpu()

    def ranks(multiplier: float) -> list[int]:
        choice = (values[:, None] * errors + multiplier * prices).argmin(dim=1)
        return torch.bincount(choice, minlength=len(prices))[1:].tolist()

    def spent(counts: list[int]) -> int:
        return sum(count * cost for count, cost in zip(counts, costs.values(), strict=True))

    if not len(values) or spent(ranks(0.0)) <= budget:
        return ranks(0.0)
    low, high = 0.0, float(values[0])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(ranks(middle)) > budget else (low, middle)
    return ranks(high)


def best_sizes(
    errors: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """Choose one of several sizes for every matrix: the least sum of errors under the budget.

    A 0/1 linear program with a variable for each matrix and size, solved by HiGHS.

    Args:
        errors: Of each matrix, the error at each of its sizes.
        costs: The sizes, in bits.
        budget: Bits of all matrices together; the smallest sizes must fit.

    Returns:
        For each matrix the position of its size.

    Raises:
        NumericalError: The smallest sizes exceed the budget, or an error is not finite.
    """
    names = list(errors)
    counts = [len(errors[name]) for name in names]
    objective = np.concatenate([np.asarray(errors[name], dtype=np.float64) for name in names])
    sizes = np.concatenate([np.asarray(costs[name], dtype=np.float64) for name in names])
    largest = np.abs(objective).max()
    if not np.isfinite(largest):
        raise NumericalError("allocation: an expected error is not finite; check the statistics")
    owner = np.repeat(np.arange(len(names)), counts)
    places = np.arange(len(objective))
    one_each = csr_array((np.ones(len(objective)), (owner, places)))
    solved = milp(
        objective / (largest or 1.0),
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_array(sizes[None] / budget), ub=1.0),
            LinearConstraint(one_each, lb=1, ub=1),
        ],
        options={"mip_rel_gap": OPTIMALITY_GAP},
    )
    if solved.x is None:
        raise NumericalError(f"allocation: no choice of sizes fits {budget} bits: {solved.message}")
    chosen = np.split(solved.x, np.cumsum(counts)[:-1])
    return {name: int(part.argmax()) for name, part in zip(names, chosen, strict=True)}
