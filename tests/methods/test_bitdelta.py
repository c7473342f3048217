import pytest
import torch
from method_examples import Example, Ladder

from llmpress.methods.base import InputStatistics
from llmpress.methods.bitdelta import BitDelta
from llmpress.numerics.linalg import relative_output_error

EXAMPLES = [Example({"scale": "mean"}), Example({"scale": "output"}, needs_statistics=True)]
LADDERS: list[Ladder] = []  # one size only
BETTER_THAN = [
    ({"scale": "output"}, "bitdelta", {"scale": "mean"}),
]


def realistic(out_features: int, in_features: int) -> tuple[torch.Tensor, InputStatistics]:
    inputs = torch.randn(300, 10) @ torch.randn(10, in_features)
    inputs[:, 0] *= 20
    moment = inputs.T @ inputs / 300
    delta = 1e-3 * torch.randn(out_features, 1) * torch.rand(1, in_features)
    return delta + 1e-4 * torch.randn(out_features, in_features), InputStatistics(moment, 300)


def test_mean_scale_is_the_mean_of_the_sizes() -> None:
    delta = torch.tensor([[1.0, -2.0, 0.0], [3.0, -4.0, 5.0]])
    layer = BitDelta(scale="mean").compress(delta)
    expected = 2.5 * torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]])
    torch.testing.assert_close(layer.dequantize(), expected)


def test_output_scale_is_the_optimum_for_the_inputs() -> None:
    delta, statistics = realistic(20, 40)
    layer = BitDelta(scale="output").compress(delta, statistics)
    best = layer.dequantize()
    error = relative_output_error(delta, best, statistics.second_moment)
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = relative_output_error(delta, factor * best, statistics.second_moment)
        assert other > error, factor
    mean = BitDelta(scale="mean").compress(delta).dequantize()
    assert error < relative_output_error(delta, mean, statistics.second_moment)


def test_without_any_input_the_mean_is_taken() -> None:
    delta, _ = realistic(20, 40)
    nothing = InputStatistics(torch.zeros(40, 40), 1)
    layer = BitDelta(scale="output").compress(delta, nothing)
    torch.testing.assert_close(layer.scale.detach(), delta.abs().mean().reshape(1))


def test_one_bit_per_weight() -> None:
    assert BitDelta(scale="mean").compress(torch.randn(64, 64)).stored_bits() == 64 * 64 + 32


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="scale='median'"):
        BitDelta(scale="median")
