import pytest
import torch
from method_examples import Example

from llmpress.methods.magnitude import Magnitude
from llmpress.nn.layers.sparse import sparse_bits

EXAMPLES = [
    Example({"sparsity": 0.5}),
    Example({"bits": 2.0}, may_refuse=200),
    Example({"sparsity": 0.9, "mode": "dare"}),
]
LADDERS = [
    [{"bits": bits} for bits in (0.5, 1, 2, 4, 8, 17.5)],
    [{"sparsity": sparsity} for sparsity in (0.99, 0.9, 0.5, 0.1, 0.0)],
]
BETTER_THAN = [
    ({"bits": 2.0}, "magnitude", {"bits": 2.0, "mode": "dare"}),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9, 0.99])
def test_the_largest_entries_are_kept_as_they_are(sparsity: float) -> None:
    weight = ((torch.randperm(1000) + 1) / 1024).view(20, 50) * torch.randn(20, 50).sign()
    dequantized = Magnitude(sparsity=sparsity).compress(weight).dequantize()
    expected = torch.where(weight.abs() > 1000 * sparsity / 1024, weight, 0.0)
    torch.testing.assert_close(dequantized, expected, rtol=0, atol=0)


def test_of_equal_entries_the_first_are_kept() -> None:
    dequantized = Magnitude(sparsity=0.5).compress(torch.ones(2, 8)).dequantize()
    torch.testing.assert_close(dequantized, torch.tensor([[1.0] * 8, [0.0] * 8]))


@pytest.mark.parametrize("bits", [0.3, 1.0, 1.05, 4.0, 17.5])
@pytest.mark.parametrize("shape", [(30, 100), (100, 30)], ids=str)
def test_bits_buy_as_many_entries_as_fit(shape: tuple[int, int], bits: float) -> None:
    layer = Magnitude(bits=bits).compress(torch.randn(shape))
    budget = bits * 3000
    assert layer.stored_bits() <= budget
    kept = layer.num_nonzeros
    assert kept == 3000 or sparse_bits(shape[1], shape[0], kept + 1) > budget


def test_dare_is_right_on_average() -> None:
    weight = torch.randn(6, 10)
    seeds = range(200)
    method = Magnitude(sparsity=0.5, mode="dare")
    mean = sum(method.compress(weight, seed=seed).dequantize() for seed in seeds) / len(seeds)
    torch.testing.assert_close(mean, weight, rtol=0, atol=0.7)
    one = method.compress(weight, seed=1).dequantize()
    kept = one != 0
    assert int(kept.sum()) == 30
    torch.testing.assert_close(one[kept], 2 * weight[kept], rtol=1e-3, atol=0)
    other = method.compress(weight, seed=2).dequantize() != 0
    assert bool((kept != other).any())


def test_a_budget_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=0\.001: .*\[4, 5\] .*3\.6000"):
        Magnitude(bits=0.001).compress(torch.randn(4, 5))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": 0.5, "bits": 2.0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"bits": 0.0},
        {"sparsity": 0.5, "mode": "random"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="|".join(settings) or "sparsity"):
        Magnitude(**settings)
