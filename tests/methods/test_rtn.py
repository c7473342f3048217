import pytest
import torch
from method_examples import Example

from llmpress.methods.rtn import RTN
from llmpress.numerics.grids import fit_grid, nearest_codes

EXAMPLES = [
    Example({"num_bits": 4, "group_size": 16}),
    Example({"num_bits": 1, "group_size": 5}),
    Example({"num_bits": 8, "group_size": 1000}),
]
LADDERS = [
    [{"num_bits": bits, "group_size": 32} for bits in range(1, 9)],
    [{"num_bits": 3, "group_size": size} for size in (160, 32, 8)],
]


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("group_size", [1, 7, 32, 200])
def test_no_weight_is_further_than_half_a_step(num_bits: int, group_size: int) -> None:
    weight = torch.randn(9, 50)
    layer = RTN(num_bits, group_size).compress(weight)
    steps = layer.scales.detach().float().repeat_interleave(layer.group_size, dim=1)[:, :50]
    # zero lies on the grid, so an end may lie half a step off; fp16 adds a little more
    error = (layer.dequantize().float() - weight).abs()
    inside = error <= steps / 2 + 2e-3 * weight.abs() + 1e-6
    beyond_an_end = error <= steps + 2e-3
    assert bool(beyond_an_end.all())
    assert float((~inside).float().mean()) < (0.3 if num_bits < 3 else 0.05)


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_weights_on_a_grid_are_kept_exactly(num_bits: int) -> None:
    levels = (1 << num_bits) - 1
    codes = torch.randint(levels + 1, (6, 32))
    codes[:, 0], codes[:, 1] = 0, levels
    weight = 0.125 * (codes - torch.randint(levels + 1, (6, 1)))
    torch.testing.assert_close(RTN(num_bits, 32).compress(weight).dequantize().float(), weight)


@pytest.mark.parametrize("num_bits", [1, 3, 8])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-12, -1e-12])
def test_constant_groups_are_kept(num_bits: int, value: float) -> None:
    weight = torch.full((3, 10), value)
    dequantized = RTN(num_bits, 4).compress(weight).dequantize().float()
    torch.testing.assert_close(dequantized, weight, rtol=1e-3, atol=1e-7)


def test_weights_too_small_for_fp16_scales_are_rounded_not_lost() -> None:
    weight = torch.tensor([[4e-8, -4e-8, 9e-8, 0.0]])
    dequantized = RTN(4, 4).compress(weight).dequantize().float()
    step = 2.0**-24
    expected = torch.tensor([[step, -step, 2 * step, 0.0]])
    torch.testing.assert_close(dequantized, expected, rtol=0, atol=0)


def test_two_groups_do_not_share_a_scale() -> None:
    weight = torch.cat([torch.randn(4, 8), 100 * torch.randn(4, 8)], dim=1)
    alone = RTN(3, 8).compress(weight[:, :8].contiguous()).dequantize()
    together = RTN(3, 8).compress(weight).dequantize()
    torch.testing.assert_close(together[:, :8], alone, rtol=0, atol=0)


def test_size_is_that_of_codes_scales_and_zero_points() -> None:
    layer = RTN(3, 16).compress(torch.randn(8, 64))
    assert layer.stored_bits() == 3 * 8 * 64 + (16 + 3) * 8 * 4


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        RTN(4, 8).compress(torch.full((2, 8), 1e6))


@pytest.mark.parametrize("settings", [{"num_bits": 0}, {"num_bits": 9}, {"group_size": 0}])
def test_bad_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RTN(**settings)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 8])
def test_searched_range_is_never_worse_and_heeds_importance(num_bits: int) -> None:
    weight = torch.randn(20, 60) ** 3
    importance = torch.rand(60) ** 4

    def errors(**options: object) -> torch.Tensor:
        grid = fit_grid(weight, num_bits, 16, **options)
        codes = nearest_codes(weight, grid, num_bits, 16)
        groups = torch.arange(60) // 16
        back = grid.scales[:, groups].float() * (codes - grid.zero_points[:, groups])
        return (back - weight).square()

    plain, searched = errors(), errors(search=True)
    if num_bits < 8:  # with 256 levels no clipping pays
        assert float(searched.sum()) < float(plain.sum())
    weighted = errors(search=True, importance=importance)
    if num_bits < 8:
        assert float((weighted * importance).sum()) < float((searched * importance).sum())
    for group in range(4):
        columns = slice(16 * group, 16 * group + 16)
        better = searched[:, columns].sum(1) <= plain[:, columns].sum(1) * (1 + 1e-5)
        assert bool(better.all())
