import pytest
import torch
from method_examples import Example

from llmpress.methods.base import InputStatistics
from llmpress.methods.svd import SVD
from llmpress.numerics.linalg import relative_output_error, relative_weight_error

EXAMPLES = [
    Example({"rank": 1}),
    Example({"keep": 0.5}, may_refuse=200),
    Example({"bits": 6.0, "whiten": True}, needs_statistics=True, may_refuse=200),
]
LADDERS = [
    [{"bits": bits} for bits in (0.5, 1, 2, 4, 8)],
    [{"rank": rank, "whiten": True} for rank in (1, 4, 16, 48)],
]
BETTER_THAN = [
    ({"bits": 2.0, "whiten": True}, "svd", {"bits": 2.0}),
]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33)], ids=str)
def test_error_is_that_of_the_triplets_cut(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    layer = SVD(rank=10).compress(weight)
    cut = torch.linalg.svdvals(weight)[10:].square().sum() / weight.square().sum()
    error = relative_weight_error(weight, layer.A.float() @ layer.B.float())
    assert error == pytest.approx(float(cut), rel=5e-3)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("tokens", [500, 12], ids=["definite", "singular"])
def test_whitened_error_is_that_of_the_output_directions_cut(
    shape: tuple[int, int], tokens: int
) -> None:
    inputs = torch.randn(tokens, shape[1]) * torch.logspace(1, -1, shape[1])
    moment = inputs.T @ inputs / tokens
    weight = torch.randn(shape)
    layer = SVD(rank=8, whiten=True).compress(weight, InputStatistics(moment, tokens))
    variances = torch.linalg.eigvalsh(weight @ moment @ weight.T).flip(0)
    error = relative_output_error(weight, layer.A.float() @ layer.B.float(), moment)
    assert error == pytest.approx(float(variances[8:].sum() / variances.sum()), rel=2e-2, abs=2e-5)


def test_singular_statistics_do_not_wipe_out_what_calibration_has_not_seen() -> None:
    weight = torch.randn(12, 30)
    moment = torch.zeros(30, 30)
    moment[:15, :15] = torch.eye(15)
    layer = SVD(rank=12, whiten=True).compress(weight, InputStatistics(moment, 15))
    assert relative_weight_error(weight, layer.A.float() @ layer.B.float()) < 1e-4


@pytest.mark.parametrize("bits", [0.5, 1.0, 3.0, 8.0, 16.0])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (100, 100)], ids=str)
def test_bits_buy_the_largest_rank_within_them(shape: tuple[int, int], bits: float) -> None:
    layer = SVD(bits=bits).compress(torch.randn(shape))
    budget = bits * shape[0] * shape[1]
    assert layer.stored_bits() <= budget
    one_more = layer.stored_bits() + 16 * (shape[0] + shape[1])
    assert one_more > budget or layer.rank == min(shape)


def test_keep_is_a_share_of_the_parameters() -> None:
    layer = SVD(keep=0.3).compress(torch.randn(100, 100))
    assert layer.rank == 15  # 15 (100 + 100) = 3000 of 10,000


def test_budgets_without_a_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=0\.01: rank 1 .*\[10, 20\] .*2\.4000"):
        SVD(bits=0.01).compress(torch.randn(10, 20))
    with pytest.raises(ValueError, match=r"keep=0\.01: rank 1 .* 0\.1500"):
        SVD(keep=0.01).compress(torch.randn(10, 20))
    with pytest.raises(ValueError, match=r"rank=11: .*1 to 10"):
        SVD(rank=11).compress(torch.randn(10, 20))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 3, "bits": 2.0},
        {"rank": 0},
        {"keep": 0.0},
        {"keep": 1.5},
        {"bits": -1.0},
        {"bits": float("nan")},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="|".join(settings) or "rank"):
        SVD(**settings)
