import pytest
import torch
from method_examples import Example
from torch import Tensor

from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.methods.bitdelta import BitDelta
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.methods.delta_come.budget import expected_best_ranks
from llmpress.methods.rtn import RTN
from llmpress.methods.svd import SVD
from llmpress.nn.layers.mixed_low_rank import SCALE_BITS, MixedLowRankLinear, group_bits
from llmpress.numerics.linalg import relative_output_error, relative_weight_error

EXAMPLES = [
    Example({"bits": 1.5}, may_refuse=200),
    Example(
        {"bits": 3.0, "precisions": (16, 3), "ranks": (300,), "group_size": 11}
        | {
            "allocation": "fixed",
            "basis": "weight",
            "correct_left": False,
            "search_range": False,
        },
        may_refuse=1000,
    ),
]
LADDERS = [[{"bits": bits} for bits in (0.5, 1, 2, 4)]]
BETTER_THAN = [
    ({"bits": 1.11}, "svd", {"rank": 8, "whiten": True}),
    ({"bits": 2.22}, "svd", {"rank": 16, "whiten": True}),
]
SMALLEST = {"group_size": 16}

PAPER = {
    "precisions": (8, 3, 2),
    "allocation": "fixed",
    "ranks": (2, 32),
    "search_range": False,
    "basis": "weight",
    "correct_left": False,
}


def sample(out_features: int = 160, in_features: int = 192) -> tuple[Tensor, InputStatistics]:
    """A delta with a falling spectrum, and inputs with a few large channels, as real ones."""
    rank = min(out_features, in_features)
    left, _ = torch.linalg.qr(torch.randn(out_features, rank))
    right, _ = torch.linalg.qr(torch.randn(in_features, rank))
    spectrum = 1e-2 * torch.arange(1, rank + 1) ** -0.7
    mixing = torch.randn(in_features, in_features) / in_features**0.5
    inputs = torch.randn(1000, in_features) @ mixing * torch.logspace(0.7, -0.3, in_features)
    return (left * spectrum) @ right.T, InputStatistics(inputs.T @ inputs / 1000, 1000)


def output_error(method: Method, delta: Tensor, statistics: InputStatistics) -> float:
    approximation = method.compress(delta, statistics).dequantize()
    return relative_output_error(delta, approximation, statistics.second_moment)


@pytest.mark.parametrize("bits", [0.15, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(160, 192), (192, 64), (130, 130)], ids=str)
@pytest.mark.parametrize("settings", [{}, PAPER], ids=["default", "paper"])
def test_the_budget_is_met_and_used_up(
    shape: tuple[int, int], bits: float, settings: dict[str, object]
) -> None:
    delta, statistics = sample(*shape)
    method = DeltaCoMe(bits=bits, **settings)  # type: ignore[arg-type]
    layer = method.compress(delta, statistics)
    budget = bits * delta.numel()
    assert layer.stored_bits() <= budget
    cheapest = group_bits(shape[1], shape[0], 1, method.precisions[-1], method.group_size)
    assert layer.stored_bits() > budget - cheapest - 64


@pytest.mark.parametrize(
    ("bits", "others"),
    [
        (1.0, [SVD(bits=1.0), SVD(bits=1.0, whiten=True), BitDelta(), RTN(num_bits=1)]),
        (0.5, [SVD(bits=0.5), SVD(bits=0.5, whiten=True), BitDelta()]),
        (0.3, [SVD(bits=0.3), SVD(bits=0.3, whiten=True), BitDelta()]),
    ],
)
def test_it_beats_the_baselines_at_no_more_bits(bits: float, others: list[Method]) -> None:
    delta, statistics = sample()
    mine = output_error(DeltaCoMe(bits=bits), delta, statistics)
    for other in others:
        assert mine < 0.8 * output_error(other, delta, statistics), other


@pytest.mark.parametrize(
    "settings",
    [PAPER, {"correct_left": False}],
    ids=["paper", "correct_left"],
)
def test_each_default_is_the_winner(settings: dict[str, object]) -> None:
    changed = DeltaCoMe(bits=0.6, **settings)  # type: ignore[arg-type]
    best, other = 0.0, 0.0
    for _ in range(4):
        delta, statistics = sample()
        best += output_error(DeltaCoMe(bits=0.6), delta, statistics)
        other += output_error(changed, delta, statistics)
    assert best < other


@pytest.mark.parametrize(
    "settings", [{"search_range": True}, {"basis": "output"}], ids=["search_range", "basis"]
)
def test_what_lowers_the_error_on_the_inputs_it_was_fitted_to(settings: dict[str, object]) -> None:
    """On those alone: whole models on other text are why these are no defaults."""
    fitted, other = 0.0, 0.0
    for _ in range(4):
        delta, statistics = sample()
        fitted += output_error(DeltaCoMe(bits=0.6, **settings), delta, statistics)  # type: ignore[arg-type]
        other += output_error(DeltaCoMe(bits=0.6), delta, statistics)
    assert fitted < other


def test_statistics_are_what_the_outputs_gain_from() -> None:
    delta, statistics = sample()
    blind = DeltaCoMe().compress(delta).dequantize()
    aware = output_error(DeltaCoMe(), delta, statistics)
    assert aware < 0.9 * relative_output_error(delta, blind, statistics.second_moment)
    seen = DeltaCoMe().compress(delta, statistics).dequantize()
    assert relative_weight_error(delta, blind) < relative_weight_error(delta, seen)


def test_leading_ranks_follow_the_width_of_the_matrix() -> None:
    delta, statistics = sample(512, 512)
    method = DeltaCoMe(bits=1.0, precisions=(8, 3, 2), allocation="fixed", ranks=(16, 32))
    layer = method.compress(delta, statistics)
    assert layer.groups[:2] == [(2, 8), (4, 3)]
    assert layer.groups[2][1] == 2


def test_a_delta_of_low_rank_is_stored_with_its_rank_alone() -> None:
    delta = torch.randn(96, 3) @ torch.randn(3, 128)
    layer = DeltaCoMe(bits=4.0).compress(delta)
    assert layer.rank <= 3 * 2  # three triplets, and at most as many again for rounding errors
    assert relative_weight_error(delta, layer.dequantize()) < 1e-3


def test_a_delta_of_zeros_stays_zero() -> None:
    layer = DeltaCoMe().compress(torch.zeros(96, 128))
    assert layer.rank == 0
    torch.testing.assert_close(layer.dequantize(), torch.zeros(96, 128))


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6])
def test_the_size_of_a_delta_does_not_matter(factor: float) -> None:
    delta, statistics = sample()
    expected = output_error(DeltaCoMe(), delta, statistics)
    scaled = output_error(DeltaCoMe(), delta * factor, statistics)
    assert scaled == pytest.approx(expected, rel=0.02)
    sigma = DeltaCoMe().compress(delta * factor, statistics).sigma
    assert 2**10 < float(sigma.max()) < 2**15  # well inside fp16, whatever the delta's size


def test_an_unreachable_budget_names_the_smallest_one() -> None:
    delta, statistics = sample()
    with pytest.raises(ValueError, match=r"bits=0\.01") as error:
        DeltaCoMe(bits=0.01).compress(delta, statistics)
    smallest = float(str(error.value).split()[-1])
    layer = DeltaCoMe(bits=smallest).compress(delta, statistics)
    assert isinstance(layer, MixedLowRankLinear)
    assert layer.rank == 1
    with pytest.raises(ValueError, match="bits="):
        DeltaCoMe(bits=smallest - 2e-4).compress(delta, statistics)


def test_a_search_is_better_than_where_it_starts_and_than_the_paper() -> None:
    delta, statistics = sample()
    greedy = DeltaCoMe(bits=0.5, precisions=(8, 3, 2), allocation="greedy")
    found = output_error(greedy, delta, statistics)
    start = DeltaCoMe(bits=0.5, precisions=(2,), allocation="matrix")
    fixed = DeltaCoMe(bits=0.5, precisions=(8, 3, 2), allocation="fixed", ranks=(2, 32))
    assert found < 0.95 * output_error(start, delta, statistics)
    assert found < output_error(fixed, delta, statistics)


def test_outputs_that_the_loss_feels_are_kept_better() -> None:
    delta, plain = sample()
    felt = torch.where(torch.arange(160) < 20, 100.0, 1.0)
    statistics = InputStatistics(plain.second_moment, plain.num_tokens, felt)

    def errors(basis: str) -> Tensor:
        method = DeltaCoMe(bits=0.4, basis=basis, allocation="matrix")  # type: ignore[arg-type]
        error = delta - method.compress(delta, statistics).dequantize()
        return ((error @ plain.second_moment) * error).sum(dim=1)  # [out]

    loss, output = errors("loss"), errors("output")
    assert (felt * loss).sum() < 0.7 * (felt * output).sum()
    assert loss[20:].sum() > output[20:].sum()


def test_bits_go_to_the_matrices_that_the_loss_feels() -> None:
    delta, statistics = sample()
    method = DeltaCoMe(bits=0.5, allocation="model")
    shape = Shape(*delta.shape)
    shapes = dict.fromkeys(("quiet", "loud"), shape)
    errors = method.sensitivity(delta, statistics)
    assert errors == sorted(errors, reverse=True)
    plan = method.plan(shapes, 10**6, {"quiet": errors, "loud": [50 * e for e in errors]})
    bits = {name: layer.bits for name, layer in plan.items() if isinstance(layer, DeltaCoMe)}
    assert bits["quiet"] < 0.5 < bits["loud"] <= 1.0
    assert sum(bits.values()) <= 1.0
    assert set(method.plan(shapes, 10**6).values()) == {method}  # nothing to go by


def test_a_factorization_that_needed_more_dampening_says_so() -> None:
    delta, _ = sample(96, 128)
    vector = torch.rand(128, 1) * 1e4
    singular = vector @ vector.T
    singular[0, 0] *= 1 - 1e-3  # not positive definite
    statistics = InputStatistics(singular, 1000)
    layer = DeltaCoMe(bits=1.0, dampening=0.0).compress(delta, statistics)
    assert layer.notes["right_dampening"] > 1e-4
    assert DeltaCoMe().compress(delta).notes["right_dampening"] == 1e-4


def test_more_important_triplets_never_get_fewer_bits() -> None:
    values = torch.arange(1, 101, dtype=torch.float64) ** -1.5
    costs, left = [800, 420, 230], [0.0001, 0.02, 0.4]
    ranks = expected_best_ranks(values, 10_000, costs, left)
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert 9_000 < spent <= 10_000
    assert all(ranks)
    assert expected_best_ranks(values, 10**9, costs, left) == [100, 0, 0]


def test_a_penalty_on_cuts_buys_more_triplets_of_fewer_bits() -> None:
    delta, statistics = sample()

    def triplets(penalty: float) -> tuple[int, float]:
        groups = DeltaCoMe(bits=0.5, cut_penalty=penalty).compress(delta, statistics).groups
        count = sum(rank for rank, _ in groups)
        return count, sum(rank * num_bits for rank, num_bits in groups) / count

    counts, mean_bits = zip(*(triplets(penalty) for penalty in (1.0, 3.0, 10.0)), strict=True)
    assert counts[0] < counts[1] < counts[2]
    assert mean_bits[0] > mean_bits[1] > mean_bits[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.0}, "bits=0.0"),
        ({"precisions": (2, 3)}, r"precisions=\[2, 3\]"),
        ({"precisions": (9,)}, r"precisions=\[9\]"),
        ({"precisions": ()}, r"precisions=\[\]"),
        ({"precisions": (8, 2), "allocation": "fixed", "ranks": (1, 2)}, r"ranks=\[1, 2\]"),
        ({"precisions": (8, 2), "allocation": "fixed", "ranks": (0,)}, r"ranks=\[0\]"),
        ({"ranks": (1, 2, 3, 4)}, "'fixed' needs ranks"),
        ({"allocation": "fixed"}, "'fixed' needs ranks"),
        ({"allocation": "best"}, "allocation='best'"),
        ({"group_size": 0}, "group_size=0"),
        ({"cut_penalty": 0.5}, "cut_penalty=0.5"),
        ({"basis": "input"}, "basis='input'"),
        ({"dampening": 1.0}, "dampening=1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaCoMe(**settings)  # type: ignore[arg-type]


def test_scale_bits_is_the_size_of_the_scale() -> None:
    layer = DeltaCoMe().compress(torch.randn(64, 64))
    assert 8 * layer.scale.numel() * layer.scale.element_size() == SCALE_BITS
