"""ClusComp: the size it promises, the vectors it cuts, the loss it trains."""

import pytest
import torch
from method_examples import Example

from llmpress.methods.base import InputStatistics, Shape, Term
from llmpress.methods.cluscomp import ClusComp
from llmpress.methods.cluscomp.budget import CodebookSize, true_bits
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.nn.packing import unpack
from llmpress.numerics.linalg import relative_output_error

EXAMPLES = [
    Example({"num_entries": 16, "vector_size": 3}),
    Example(
        {"num_entries": 7, "vector_size": 1, "weighted": False, "iterations": 3}
        | {"scaled": False, "feedback": False}
    ),
    Example({"bits": 4.0}, may_refuse=1000),
    Example({"bits": 5.0, "codebook_dtype": "int8", "rounds": 1}, may_refuse=1000),
]
LADDERS = [[{"bits": bits} for bits in (1.0, 2.0, 3.0, 4.0)]]
BETTER_THAN = [
    ({"bits": 3.56}, "rtn", {"num_bits": 3, "group_size": 32}),
    ({"bits": 2.56}, "rtn", {"num_bits": 2, "group_size": 32}),
]


@pytest.mark.parametrize(
    "method",
    [
        ClusComp(bits=4.5),
        ClusComp(bits=4.5, scaled=False),
        ClusComp(num_entries=300, vector_size=3),
        ClusComp(num_entries=64, vector_size=3, codebook_dtype="int8"),
    ],
    ids=["auto", "unscaled", "fixed", "int8"],
)
def test_true_bits_are_what_a_layer_stores(method: ClusComp) -> None:
    weight = torch.randn(50, 37)
    layer = method.compress(weight)
    size = CodebookSize(layer.num_entries, layer.vector_size, layer.dtype_name)
    expected = true_bits(Shape(50, 37), size, scaled=method.scaled)
    assert layer.stored_bits() == pytest.approx(expected * weight.numel())


def test_a_vector_is_consecutive_outputs_of_one_input_channel() -> None:
    weight = torch.arange(12.0).view(6, 2)  # [out, in]
    layer = ClusComp(num_entries=4, vector_size=3, scaled=False).compress(weight)
    torch.testing.assert_close(layer.dequantize(), weight)
    stored = {tuple(v) for v in layer.codebook.tolist()}
    assert stored == {(0, 2, 4), (6, 8, 10), (1, 3, 5), (7, 9, 11)}


def test_the_papers_form_never_asks_for_more_entries_than_vectors() -> None:
    layer = ClusComp(num_entries=65500, vector_size=4).compress(torch.randn(16, 16))
    assert layer.num_entries == 64


def test_weighting_lowers_the_output_error() -> None:
    weight = torch.randn(128, 96)
    scale = torch.ones(96)
    scale[:6] = 12.0
    statistics = InputStatistics(torch.diag(scale.square()), 1000)
    errors = [
        relative_output_error(
            weight,
            ClusComp(num_entries=32, vector_size=2, weighted=weighted, feedback=False, scaled=False)
            .compress(weight, statistics)
            .dequantize(),
            statistics.second_moment,
        )
        for weighted in (True, False)
    ]
    assert errors[0] < 0.85 * errors[1]


def test_a_dead_input_channel_is_harmless() -> None:
    moment = torch.eye(8)
    moment[3, 3] = 0
    layer = ClusComp(num_entries=8, vector_size=2).compress(
        torch.randn(6, 8), InputStatistics(moment, 10)
    )
    assert bool(torch.isfinite(layer.dequantize()).all())


def test_the_codebooks_gradient_is_the_sum_over_its_vectors() -> None:
    layer = ClusComp(num_entries=5, vector_size=3, scaled=False).compress(torch.randn(7, 11))
    layer.codebook.data = layer.codebook.data.double()
    layer.codebook.requires_grad_(True)
    upstream = torch.randn(7, 11)
    (layer.dequantize() * upstream).sum().backward()
    codes = unpack(layer.codes, layer.code_bits, layer.num_vectors).long()
    vectors = torch.nn.functional.pad(upstream.t(), (0, 2)).reshape(-1, 3)  # [N, d]
    expected = torch.zeros(5, 3).index_add_(0, codes, vectors)
    torch.testing.assert_close(layer.codebook.grad.float(), expected)


def test_the_relative_loss_is_blind_to_a_tokens_size() -> None:
    target = torch.randn(2, 3, 8)
    output = target + 0.1 * torch.randn_like(target)
    scale = torch.tensor([1.0, 1000.0, 1.0]).view(1, 3, 1)
    method = ClusComp(bits=3.0)
    torch.testing.assert_close(
        method.block_loss(output * scale, target * scale), method.block_loss(output, target)
    )
    plain = ClusComp(bits=3.0, loss="mse")
    torch.testing.assert_close(
        plain.block_loss(output, target), torch.nn.functional.mse_loss(output, target)
    )


def test_the_second_term_is_optional() -> None:
    assert ClusComp(bits=3.0).loss_terms() == (Term("student", "teacher"),)
    assert Term("student", "student") in ClusComp(bits=3.0, own_target=True).loss_terms()


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 3.0, "num_entries": 4}, {"num_entries": 4}, {"bits": 40.0}]
)
def test_contradicting_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bits"):
        ClusComp(**settings)


def test_codes_are_packed_at_their_own_width() -> None:
    layer = CodebookLinear(64, 64, num_entries=1000, vector_size=4)
    assert layer.code_bits == 10
    assert layer.codes.numel() == 64 * 16 * 10 // 8


def correlated(
    out_features: int = 96, in_features: int = 80
) -> tuple[torch.Tensor, InputStatistics]:
    inputs = torch.randn(400, 20) @ torch.randn(20, in_features)
    inputs += 0.3 * torch.randn(400, in_features)
    felt = torch.rand(out_features).pow(4) + 1e-3
    statistics = InputStatistics(inputs.t() @ inputs / 400, 400, felt)
    return torch.randn(out_features, in_features) * torch.rand(out_features, 1), statistics


def felt_error(weight: torch.Tensor, method: ClusComp, statistics: InputStatistics) -> float:
    """What `compress` minimises: squared output errors times what the loss feels of them."""
    error = weight - method.compress(weight, statistics).dequantize()
    assert statistics.output_sensitivity is not None
    return float(
        ((error @ statistics.second_moment) * error).sum(1) @ statistics.output_sensitivity
    )


@pytest.mark.parametrize(
    ("change", "least"),
    [({"feedback": False}, 1.3), ({"rounds": 0}, 1.01), ({"importance": False}, 1.05)],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_refinement_lowers_the_felt_error(change: dict[str, bool], least: float) -> None:
    weight, statistics = correlated()
    settings = {"num_entries": 32, "vector_size": 3}
    best = felt_error(weight, ClusComp(**settings), statistics)
    assert felt_error(weight, ClusComp(**settings, **change), statistics) > least * best


def test_int8_codebooks_stay_near_fp16_ones() -> None:
    weight, statistics = correlated()
    half, eighth = (
        felt_error(
            weight, ClusComp(num_entries=32, vector_size=3, codebook_dtype=dtype), statistics
        )
        for dtype in ("float16", "int8")
    )
    assert eighth < 1.05 * half


def test_a_row_of_zeros_stays_zero() -> None:
    weight, statistics = correlated()
    weight[5] = 0
    torch.testing.assert_close(
        ClusComp(bits=4.0).compress(weight, statistics).dequantize()[5], torch.zeros(80)
    )


def test_the_plan_spends_one_budget_where_it_is_felt() -> None:
    shapes = {"a": Shape(256, 256), "b": Shape(256, 256)}
    method = ClusComp(bits=3.0)
    even, uneven = (
        {name: layer.codebook_size(shapes[name]) for name, layer in plan.items()}
        for plan in (method.plan(shapes, 1), method.plan(shapes, 1, {"a": 1.0, "b": 60.0}))
    )
    given = {name: true_bits(shapes[name], size) for name, size in even.items()}
    assert given["a"] == pytest.approx(given["b"], rel=0.15)  # the steps of the frontier are coarse
    assert true_bits(shapes["b"], uneven["b"]) > true_bits(shapes["a"], uneven["a"]) + 1
    for sizes in (even, uneven):
        assert sum(true_bits(shapes[name], size) for name, size in sizes.items()) <= 6.0
    same = ClusComp(bits=3.0, allocation="uniform").plan(shapes, 1, {"a": 1.0, "b": 60.0})
    assert same["a"] == same["b"]


def test_sensitivity_is_the_felt_error_of_wholly_wrong_weights() -> None:
    """Without feedback: of weights whose errors are independent and as large as themselves."""
    weight, statistics = correlated()
    method = ClusComp(bits=3.0, feedback=False)
    signs = torch.randint(0, 2, (4000, *weight.shape)).float() * 2 - 1
    error = signs * weight
    felt = ((error @ statistics.second_moment) * error).sum(2) @ statistics.output_sensitivity
    assert method.sensitivity(weight, statistics) == pytest.approx(float(felt.mean()), rel=0.03)
    assert ClusComp(bits=3.0).sensitivity(weight, statistics) < 0.7 * float(felt.mean())
    unknown = InputStatistics(statistics.second_moment, 400)
    assert ClusComp(bits=3.0).sensitivity(weight, unknown) == weight.numel()
    assert ClusComp(bits=3.0, importance=False).sensitivity(weight, statistics) == weight.numel()
