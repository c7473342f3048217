import pytest
import torch

from llmpress.nn.layers.sign import SignLinear


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (9, 1)], ids=str)
def test_signs_and_scale_come_back(shape: tuple[int, int]) -> None:
    positive = torch.rand(shape) > 0.5
    layer = SignLinear.from_signs(positive, torch.tensor(0.37))
    expected = torch.where(positive, 0.37, -0.37)
    torch.testing.assert_close(layer.dequantize(), expected, rtol=0, atol=0)


def test_one_bit_per_weight_and_one_scale() -> None:
    layer = SignLinear.from_signs(torch.rand(24, 16) > 0.5, torch.tensor(1.0))
    assert layer.stored_bits() == 24 * 16 + 32
    assert layer.spec() == {}
