"""Intervals hold what they promise, and 5 % are told apart at a handful of windows."""

import math
import random
from statistics import fmean

import pytest

from llmpress.evaluation.uncertainty import paired_difference, standard_error

WINDOWS = 8
# As on SmolLM2's validation text: two runs share most of what spreads their windows.
SPREAD, OWN_SPREAD = 0.3, 0.025
TRIALS = 2000


def distinguishable(first: list[float], second: list[float], level: float = 0.95) -> bool:
    return paired_difference(first, second).is_distinguishable(level)


def runs(factor: float, draw: random.Random, windows: int = WINDOWS) -> tuple[list[float], ...]:
    """Divergences of two runs by window, the second ``factor`` times as large."""
    hard = [draw.lognormvariate(0, SPREAD) for _ in range(windows)]
    return tuple(
        [scale * window * draw.lognormvariate(0, OWN_SPREAD) for window in hard]
        for scale in (1.0, factor)
    )


def test_no_more_than_one_in_twenty_equal_pairs_is_told_apart() -> None:
    draw = random.Random(0)
    found = [distinguishable(*runs(1.0, draw)) for _ in range(TRIALS)]
    assert fmean(found) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(level: float) -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(TRIALS):
        first = [draw.gauss(2.0, 1.0) for _ in range(WINDOWS)]
        second = [value + 0.5 + draw.gauss(0.0, 0.3) for value in first]
        covered += not distinguishable([value + 0.5 for value in first], second, level)
    assert covered / TRIALS == pytest.approx(level, abs=0.02)


def test_five_percent_are_told_apart_in_pairs_and_not_by_the_numbers_alone() -> None:
    draw = random.Random(2)
    found, apart = [], []
    for _ in range(500):
        first, second = runs(1.05, draw)
        found.append(distinguishable(first, second))
        alone = math.hypot(standard_error(first), standard_error(second))
        apart.append(abs(fmean(second) - fmean(first)) > 2 * alone)
    assert fmean(found) > 0.8
    assert fmean(apart) < 0.1


def test_answers_differ_as_in_mcnemar() -> None:
    shared = [1.0] * 40 + [0.0] * 40
    won, lost = 12, 3  # what only the second, only the first answered correctly
    first = [*shared, *[0.0] * won, *[1.0] * lost]
    second = [*shared, *[1.0] * won, *[0.0] * lost]
    found = paired_difference(first, second)
    n = len(first)
    assert found.mean == pytest.approx((won - lost) / n)
    mcnemar = math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    assert found.stderr == pytest.approx(mcnemar, rel=0.01)
    assert found.is_distinguishable()
    assert not distinguishable([*shared, 0.0], [*shared, 1.0])


def test_a_single_window_tells_nothing_and_unequal_ones_are_refused() -> None:
    assert not distinguishable([1.0], [9.0])
    assert math.isnan(standard_error([1.0]))
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1.0, 2.0], [1.0])
