"""How many bits each singular triplet of a delta gets, within a matrix and over all matrices.

A triplet of variance ``λ`` is expected to leave ``λ`` of the outputs' error when it is dropped and
``λ (1 - (1 - d) (1 - e))`` when it is stored, ``d`` and ``e`` the distortions of normal numbers at
its precision: rounding ``v`` keeps ``1 - d`` of it, rounding ``u`` ``1 - e`` of that. Source: the
error in the space of singular vectors and the 0/1 program are PrinMix's, arXiv 2506.11087.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from llmpress.core.errors import NumericalError
from llmpress.numerics.grids import fit_grid, nearest_codes

SAMPLES = 1 << 20
"""Normal numbers, at least, that a distortion is measured on."""

NOISE_FLOOR = 1e-12
"""Squared singular values below this fraction of the largest are rounding errors of fp64."""

OPTIMALITY_GAP = 1e-4
"""Relative distance from the optimum at which the program over all matrices is solved."""


@lru_cache
def distortion(num_bits: int, group_size: int, *, search: bool) -> float:
    """Return the mean squared rounding error of standard normal numbers.

    Args:
        num_bits: Bits of a number, 1 to 8, or 16 for fp16.
        group_size: Numbers that share a grid.
        search: Whether the grid has the range of the least squared error.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows = math.ceil(SAMPLES / group_size)
    normal = torch.randn(rows, group_size, generator=generator, device="cpu")
    if num_bits > 8:
        rounded = normal.half().float()
    else:
        grid = fit_grid(normal, num_bits, group_size, search=search)  # one to a row
        codes = nearest_codes(normal, grid, num_bits, group_size)
        rounded = (codes - grid.zero_points) * grid.scales.float()
    return float((normal - rounded).double().square().mean())


def expected_error(values: Tensor, ranks: Sequence[int], left: Sequence[float]) -> float:
    """Return the error that is expected to be left, in the unit of the variances.

    Args:
        values: ``λ``, falling.
        ranks: How many triplets, from the first on, have each precision.
        left: What each precision leaves of a triplet, as a share of what dropping it leaves.
    """
    values = values.double().cpu()
    shares = torch.repeat_interleave(
        torch.tensor(left, dtype=torch.float64), torch.tensor(ranks, dtype=torch.int64)
    )
    stored = len(shares)
    return float((values[:stored] * shares).sum() + values[stored:].sum())


def expected_best_ranks(
    values: Tensor, budget: int, costs: Sequence[int], left: Sequence[float]
) -> list[int]:
    """Return how many triplets to store at each precision for the least expected error.

    The 0/1 program of one matrix, a precision or none for each triplet, is solved by the multiplier
    ``μ`` of ``error + μ · cost``: the optimum for what it spends, which is less than one triplet
    below the budget.

    Args:
        values: ``λ``, falling.
        budget: Bits.
        costs: Bits of one triplet at each precision, precisions falling.
        left: What each precision leaves of a triplet, as a share of what dropping it leaves.
    """
    errors = torch.tensor([1, *left], dtype=torch.float64)
    prices = torch.tensor([0, *costs], dtype=torch.float64)
    values = values.double().cpu()

    def ranks(multiplier: float) -> list[int]:
        choice = (values[:, None] * errors + multiplier * prices).argmin(dim=1)
        return torch.bincount(choice, minlength=len(prices))[1:].tolist()

    def spent(counts: list[int]) -> int:
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))

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


def num_meaningful(values: Tensor) -> int:
    """Return how many of the falling variances are more than rounding errors."""
    return int((values > NOISE_FLOOR * values[0]).sum())


def most_affordable(cost: Callable[[int], int], most: int, budget: int) -> int:
    """Return the largest rank up to ``most`` whose rising cost stays within the budget."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
