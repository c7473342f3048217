"""ClusComp: the size it promises, the vectors it cuts, the loss it trains."""

import pytest
import torch

from llmpress.layers import CodebookLinear
from llmpress.linalg import relative_output_error
from llmpress.methods.base import InputStatistics, Shape, Term
from llmpress.methods.cluscomp import (
    ClusComp,
    CodebookSize,
    choose_codebook_size,
    true_bits,
)

SHAPES = [Shape(576, 576), Shape(192, 576), Shape(1536, 576), Shape(576, 1536), Shape(4096, 11008)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.out_features}x{s.in_features}")
@pytest.mark.parametrize("bits", [1.2, 2.2, 3.0, 4.3])
def test_chosen_codebooks_stay_within_the_bits_and_use_them(shape: Shape, bits: float) -> None:
    used = true_bits(shape, choose_codebook_size(shape, bits))
    assert 0.8 * bits < used <= bits


def test_true_bits_are_what_a_layer_stores() -> None:
    weight = torch.randn(50, 37)
    for method in (ClusComp(bits=4.5), ClusComp(num_entries=300, vector_size=3)):
        layer = method.compress(weight)
        size = CodebookSize(layer.num_entries, layer.vector_size)
        assert layer.stored_bits() == pytest.approx(true_bits(Shape(50, 37), size) * weight.numel())


def test_an_unreachable_budget_names_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"bits=0\.2: .* needs at least (0\.\d+|\d\.\d+) bits"):
        choose_codebook_size(Shape(12, 12), 0.2)


def test_large_matrices_get_longer_vectors_than_small_ones() -> None:
    small, large = (choose_codebook_size(s, 2.5) for s in (Shape(128, 128), Shape(8192, 8192)))
    assert large.vector_size > small.vector_size


def test_a_vector_is_consecutive_outputs_of_one_input_channel() -> None:
    weight = torch.arange(12.0).view(6, 2)  # [out, in]
    layer = ClusComp(num_entries=4, vector_size=3).compress(weight)
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
            ClusComp(num_entries=32, vector_size=2, weighted=weighted)
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
    layer = ClusComp(num_entries=5, vector_size=3).compress(torch.randn(7, 11))
    layer.codebook.data = layer.codebook.data.double()
    layer.codebook.requires_grad_(True)
    upstream = torch.randn(7, 11)
    (layer.dequantize() * upstream).sum().backward()
    codes = layer._unpack().long()
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
