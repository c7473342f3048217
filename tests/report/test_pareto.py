import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpress.report.pareto import dominated_by, front_corners

RUNS = [(2.0, 60.0), (2.0, 50.0), (3.0, 40.0), (3.0, 65.0), (12.0, 45.0)]


def test_the_front_is_what_nobody_beats() -> None:
    assert dominated_by(RUNS, ("low", "low")) == [1, None, None, 2, 2]


def test_high_can_be_good() -> None:
    ratios = [(1 / size, -loss) for size, loss in RUNS]
    assert dominated_by(ratios, ("high", "high")) == dominated_by(RUNS, ("low", "low"))


def test_equal_runs_share_the_front() -> None:
    assert dominated_by([(1.0, 1.0), (1.0, 1.0)], ("low", "low")) == [None, None]
    assert dominated_by([], ("low", "low")) == []


VALUES = st.integers(1, 7).map(float)


@given(
    points=st.lists(st.tuples(VALUES, VALUES), max_size=12),
    best=st.tuples(st.sampled_from(["low", "high"]), st.sampled_from(["low", "high"])),
)
def test_every_run_is_on_the_front_or_beaten_by_one_that_is(
    points: list[tuple[float, float]], best: tuple[str, str]
) -> None:
    def no_worse(first: float, second: float, end: str) -> bool:
        return first <= second if end == "low" else first >= second

    found = dominated_by(points, best)
    for point, index in zip(points, found, strict=True):
        beaten = [
            other
            for other in points
            if other != point
            and all(itertools.starmap(no_worse, zip(other, point, best, strict=True)))
        ]
        assert (index is None) == (not beaten)
        assert index is None or points[index] in beaten
    front = [point for point, index in zip(points, found, strict=True) if index is None]
    assert bool(front) == bool(points)
    if front:
        corners = front_corners(front, best[0], (0.5, 8.0))
        assert {corner for corner in corners if corner in front} == set(front)
        for start, end in itertools.pairwise(corners):
            assert start[0] == end[0] or start[1] == end[1]
        qualities = [y for _, y in corners]
        assert qualities == sorted(qualities, reverse=best[1] == "low")


@pytest.mark.parametrize(
    ("best", "corners"),
    [
        ("low", [(2.0, 50.0), (3.0, 50.0), (3.0, 40.0), (14.0, 40.0)]),
        ("high", [(3.0, 40.0), (2.0, 40.0), (2.0, 50.0), (0.0, 50.0)]),
    ],
)
def test_the_line_goes_on_where_runs_are_larger(best: str, corners: list) -> None:
    assert front_corners([(3.0, 40.0), (2.0, 50.0)], best, (0.0, 14.0)) == corners


def test_sizes_within_a_hundredth_count_as_the_same() -> None:
    close = [(100.0, 0.7), (100.5, 0.3), (102.0, 0.1)]
    assert dominated_by(close, ("low", "low")) == [1, None, None]
    assert dominated_by([(1.0, 0.5), (1.005, 0.5)], ("low", "low")) == [None, 0]
