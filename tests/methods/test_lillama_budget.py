"""Ranks: what each form stores, and three ways to meet one budget."""

import itertools

import pytest
import torch

from llmpress.methods.base import Shape
from llmpress.methods.lillama.budget import (
    Budget,
    Form,
    Ranks,
    candidate_ranks,
    num_stored,
    ranks_by_loss,
    ranks_from_one_end,
    uniform_ranks,
)
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.nn.layers.pivoted_low_rank import PivotedLowRankLinear

FORMS: tuple[Form, ...] = ("factors", "pivoted")
SHAPES = {
    f"layers.{i}.{name}": shape
    for i in range(6)
    for name, shape in {"q": Shape(64, 64), "k": Shape(16, 64), "up": Shape(160, 64)}.items()
}
WEIGHTS = sum(s.out_features * s.in_features for s in SHAPES.values())


def budget(share: float, form: Form = "pivoted", step: int = 2) -> Budget:
    return Budget(SHAPES, share * WEIGHTS, step, form)


def removed(of: Budget, ranks: Ranks) -> int:
    return sum(of.saved(name, rank) for name, rank in ranks.items())


def losses(of: Budget, seed: int = 0) -> dict[str, list[float]]:
    """Falling and convex in the rank, of very different size."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in of.shapes:
        size, count = 10 ** float(torch.randn(1, generator=generator)), len(of.candidates(name))
        found[name] = [size * 0.8**rank for rank in range(count)]
    return found


@pytest.mark.parametrize("shape", [Shape(12, 20), Shape(20, 12), Shape(40000, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_numbers_stored_are_those_of_the_layer(shape: Shape, form: Form) -> None:
    layer = LowRankLinear if form == "factors" else PivotedLowRankLinear
    with torch.device("meta"):
        empty = layer(shape.in_features, shape.out_features, rank=3)
    assert 16 * num_stored(shape, 3, form) == empty.stored_bits()
    assert num_stored(shape, None, form) == shape.in_features * shape.out_features


def test_the_pivoted_form_is_smaller_by_the_square_of_the_rank_but_for_the_order() -> None:
    for shape in SHAPES.values():
        for rank in candidate_ranks(shape, 4, "factors"):
            saved = num_stored(shape, rank, "factors") - num_stored(shape, rank, "pivoted")
            assert saved == rank**2 - shape.out_features
        more, fewer = (candidate_ranks(shape, 4, form) for form in ("pivoted", "factors"))
        assert more[: len(fewer)] == fewer
        assert len(more) > len(fewer) or shape.out_features == 16  # the order costs as much there


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.4, 0.6])
def test_every_way_meets_the_budget_and_hardly_exceeds_it(form: Form, share: float) -> None:
    of = budget(share, form)
    ways = {
        "uniform": (uniform_ranks(of), 0.05),
        "bottom": (ranks_from_one_end(of, 0.3, top=False), 0.02),
        "top": (ranks_from_one_end(of, 0.3, top=True), 0.02),
        "loss": (ranks_by_loss(of, losses(of)), 0.02),
    }
    for way, (ranks, most) in ways.items():
        assert share <= removed(of, ranks) / WEIGHTS < share + most, way
        for name, rank in ranks.items():
            assert rank is None or rank in of.candidates(name)


def test_bottom_and_top_leave_the_other_end_alone() -> None:
    of, names = budget(0.1), list(SHAPES)
    bottom, top = (ranks_from_one_end(of, 0.5, top=top) for top in (False, True))
    assert bottom[names[0]] is not None
    assert bottom[names[-1]] is None
    assert top[names[0]] is None
    assert top[names[-1]] is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_the_same_size_costs_less(form: Form, seed: int) -> None:
    shapes = {"a": Shape(12, 12), "b": Shape(12, 20), "c": Shape(24, 12)}
    weights = sum(s.out_features * s.in_features for s in shapes.values())
    for share in (0.1, 0.25, 0.4):
        of = Budget(shapes, share * weights, 1, form)
        felt = losses(of, seed)
        chosen = ranks_by_loss(of, felt)

        def cost(ranks: Ranks, of: Budget = of, felt: dict[str, list[float]] = felt) -> float:
            return sum(
                felt[name][of.candidates(name).index(rank)]
                for name, rank in ranks.items()
                if rank is not None
            )

        every = (
            dict(zip(shapes, ranks, strict=True))
            for ranks in itertools.product(*([None, *of.candidates(name)] for name in shapes))
        )
        same = [r for r in every if removed(of, r) >= removed(of, chosen)]
        assert cost(chosen) <= min(cost(ranks) for ranks in same) + 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_last_matrix_gets_back_what_was_removed_too_much(form: Form) -> None:
    of = Budget({"a": Shape(64, 64)}, 500, 1, form)
    count = len(of.candidates("a"))
    hardly_rising = [1.0 - 0.001 * i for i in range(count)]  # its frontier ends at the least rank
    rank = ranks_by_loss(of, {"a": hardly_rising})["a"]
    assert rank is not None
    assert of.saved("a", rank) >= 500 > of.saved("a", rank + 1)


def test_more_is_never_removed_from_what_costs_more() -> None:
    of = budget(0.3)
    same = {name: [0.8**i for i in range(len(of.candidates(name)))] for name in of.shapes}
    dear = {**same, "layers.3.q": [100 * loss for loss in same["layers.3.q"]]}
    ranks = ranks_by_loss(of, dear)
    assert ranks["layers.3.q"] is None or ranks["layers.3.q"] > (ranks["layers.2.q"] or 64)
