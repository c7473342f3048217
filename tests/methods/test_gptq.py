import logging

import pytest
import torch
from method_examples import Example
from torch import Tensor

from llmpress.methods.base import InputStatistics
from llmpress.methods.gptq.method import GPTQ, Quantized, quantize_gptq, round_with_feedback
from llmpress.methods.rtn import RTN
from llmpress.nn.kernels.quantized_matmul.reference import dequantize_groups
from llmpress.numerics.grids import fit_grid, nearest_codes
from llmpress.numerics.linalg import relative_output_error

EXAMPLES = [
    Example({"num_bits": 3, "group_size": 16}, needs_statistics=True),
    Example({"num_bits": 1, "group_size": 500, "act_order": False}, needs_statistics=True),
    Example({"num_bits": 8, "group_size": 7, "search_range": False}, needs_statistics=True),
]
LADDERS = [
    [{"num_bits": bits, "group_size": 32} for bits in range(1, 9)],
    [{"num_bits": 3, "group_size": size} for size in (160, 32, 8)],
]
BETTER_THAN = [
    ({"num_bits": 3, "group_size": 32}, "rtn", {"num_bits": 3, "group_size": 32}),
    ({"num_bits": 2, "group_size": 32}, "rtn", {"num_bits": 2, "group_size": 32}),
]


def correlated_moment(size: int, tokens: int = 400) -> Tensor:
    inputs = torch.randn(tokens, max(1, size // 4)) @ torch.randn(max(1, size // 4), size)
    inputs = inputs + 0.3 * torch.randn(tokens, size)
    inputs[:, ::11] *= 5
    return inputs.T @ inputs / tokens


def weight_of(result: Quantized, group_size: int) -> Tensor:
    return dequantize_groups(result.codes, result.scales.float(), result.zero_points, group_size)


def optimal_brain_codes(
    weight: Tensor, moment: Tensor, scales: Tensor, zeros: Tensor, num_bits: int, order: Tensor
) -> Tensor:
    """The method as it is derived: after each column, the exact optimum of all that remain."""
    remaining = weight.double().clone()
    codes = torch.zeros_like(weight, dtype=torch.int32)
    left = order.tolist()
    while left:
        column = left.pop(0)
        code = (remaining[:, column] / scales[:, column].double() + zeros[:, column]).round()
        codes[:, column] = code.clamp(0, 2**num_bits - 1)
        rounded = (codes[:, column] - zeros[:, column]) * scales[:, column].double()
        error = remaining[:, column] - rounded
        if left:  # minimise tr(E H Eᵀ) over the columns left, this column's error being given
            H = moment.double()
            shift = torch.linalg.solve(H[left][:, left], H[left, column])
            remaining[:, left] += error[:, None] * shift
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 40), (2, 150)], ids=str)
def test_codes_are_those_of_the_derivation(shape: tuple[int, int], act_order: bool) -> None:
    weight, moment = torch.randn(shape), correlated_moment(shape[1])
    grid = fit_grid(weight, 3, 16)
    groups = torch.arange(shape[1]) // 16
    scales, zeros = grid.scales[:, groups].float(), grid.zero_points[:, groups]
    codes, dampening, attempts = round_with_feedback(
        weight, moment, scales, zeros, 3, dampening=0.05, act_order=act_order
    )
    assert (dampening, attempts) == (0.05, 1)
    order = torch.arange(shape[1])
    if act_order:
        order = moment.diagonal().argsort(descending=True, stable=True)
    damped = moment + 0.05 * moment.diagonal().mean() * torch.eye(shape[1])
    torch.testing.assert_close(
        codes, optimal_brain_codes(weight, damped, scales, zeros, 3, order), rtol=0, atol=0
    )


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_output_error_is_well_below_round_to_nearest(num_bits: int) -> None:
    weight, moment = torch.randn(48, 300), correlated_moment(300)
    result = quantize_gptq(weight, moment, num_bits, 64)
    nearest = RTN(num_bits, 64).compress(weight).dequantize()
    error = relative_output_error(weight, weight_of(result, 64), moment)
    assert error < 0.4 * relative_output_error(weight, nearest, moment)


def test_independent_inputs_mean_round_to_nearest() -> None:
    weight = torch.randn(10, 200)
    result = quantize_gptq(weight, torch.eye(200), 4, 32, search_range=False)
    expected = nearest_codes(weight, fit_grid(weight, 4, 32), 4, 32)
    torch.testing.assert_close(result.codes, expected, rtol=0, atol=0)


def test_half_steps_are_possible_zero_points() -> None:
    weight, moment = torch.randn(6, 20), torch.eye(20)
    scales, zeros = torch.full((6, 20), 0.5), torch.full((6, 20), 1.5)
    codes = round_with_feedback(weight, moment, scales, zeros, 2).codes
    grid = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    nearest = (weight[..., None] - grid).abs().argmin(dim=-1)
    torch.testing.assert_close(codes.long(), nearest)


def test_columns_without_input_keep_their_weights() -> None:
    weight, moment = torch.randn(8, 40), correlated_moment(40)
    moment[5:9] = 0
    moment[:, 5:9] = 0
    result = quantize_gptq(weight, moment, 4, 40, search_range=False)
    nearest = nearest_codes(weight, fit_grid(weight, 4, 40), 4, 40)
    torch.testing.assert_close(result.codes[:, 5:9], nearest[:, 5:9], rtol=0, atol=0)
    everything_dead = quantize_gptq(weight, torch.zeros(40, 40), 4, 40, search_range=False)
    torch.testing.assert_close(everything_dead.codes, nearest, rtol=0, atol=0)


def test_raised_dampening_is_returned_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(8, 40)
    moment = correlated_moment(40, tokens=10)
    moment.diagonal().sub_(0.02 * moment.diagonal().mean())  # no longer semi-definite
    with caplog.at_level(logging.WARNING):
        result = quantize_gptq(weight, moment, 4, 40, dampening=0.01)
    assert result.attempts == 2
    assert result.dampening == pytest.approx(0.1)
    assert "dampening of 0.1 instead of 0.01" in caplog.text


def test_settings_reach_the_core() -> None:
    weight, moment = torch.randn(16, 60), correlated_moment(60)
    statistics = InputStatistics(moment, 400)
    default = GPTQ(num_bits=2, group_size=20).compress(weight, statistics).dequantize()
    for change in ({"act_order": False}, {"search_range": False}, {"dampening": 0.5}):
        changed = GPTQ(num_bits=2, group_size=20, **change).compress(weight, statistics)
        assert float((changed.dequantize() - default).abs().max()) > 0, change


@pytest.mark.parametrize(
    "settings",
    [{"num_bits": 0}, {"num_bits": 9}, {"group_size": 0}, {"dampening": -0.1}, {"dampening": 1.0}],
)
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GPTQ(**settings)
