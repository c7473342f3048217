"""Torch's product with packed 4-bit weights gives what the formula gives."""

import pytest
import torch
from kept_weights import kept_bytes

from llmpress.methods.rtn import RTN
from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.kernels.quantized_matmul.cpu import MOST_ROWS, has_cpu_product
from llmpress.nn.layers import DenseStore
from llmpress.nn.layers.quantized import QuantizedLinear

OUT, IN = 48, 128
needs_product = pytest.mark.skipif(
    not has_cpu_product(4, 64, IN, OUT), reason="torch has no product with packed weights here"
)


def layer(num_bits: int, group_size: int, shape: tuple[int, int] = (OUT, IN)) -> QuantizedLinear:
    made = RTN(num_bits=num_bits, group_size=group_size).compress(torch.randn(shape))
    made.dense_store = DenseStore(10**6)
    return made


@needs_product
@pytest.mark.parametrize("rows", [1, MOST_ROWS])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_few_rows_multiply_by_packed_codes(num_bits: int, group_size: int, rows: int) -> None:
    quantized = layer(num_bits, group_size)
    x = torch.randn(rows, IN).bfloat16()
    with torch.no_grad():
        found = quantized(x).float()
        again = quantized(x).float()
    expected = x.float() @ quantized.dequantize().t()
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    size = (x.float().abs() @ quantized.dequantize().abs().t()).max()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=float(size) * 2**-8)
    assert quantized.dense_store.held == OUT * IN // 2 + 4 * OUT * IN // group_size


@pytest.mark.parametrize(
    ("num_bits", "group_size", "shape"),
    [(5, 64, (48, 128)), (4, 48, (48, 96)), (4, 64, (48, 96)), (4, 64, (40, 128))],
    ids=["wide codes", "group size", "short last group", "outputs"],
)
def test_what_torch_does_not_take_is_unpacked(
    num_bits: int, group_size: int, shape: tuple[int, int]
) -> None:
    assert not has_cpu_product(num_bits, group_size, *reversed(shape))
    quantized = layer(num_bits, group_size, shape)
    with torch.no_grad():
        quantized(torch.randn(1, shape[1]).bfloat16())
    assert quantized.dense_store.held == kept_bytes(shape, torch.bfloat16)


@needs_product
def test_many_rows_gradients_and_other_dtypes_take_dense_weights() -> None:
    for x in (torch.randn(MOST_ROWS + 1, IN).bfloat16(), torch.randn(1, IN)):
        quantized = layer(4, 64)
        with torch.no_grad():
            quantized(x)
        assert quantized.dense_store.held == kept_bytes((OUT, IN), x.dtype)
    x = torch.randn(1, IN, dtype=torch.bfloat16, requires_grad=True)
    layer(4, 64)(x).sum().backward()
    assert x.grad is not None


@needs_product
def test_without_room_nothing_is_repacked() -> None:
    quantized = layer(4, 64)
    quantized.dense_store = DenseStore(OUT * IN // 2)
    with torch.no_grad():
        quantized(torch.randn(1, IN).bfloat16())
    assert quantized.dense_store.held == 0


@needs_product
def test_changed_codes_are_repacked() -> None:
    quantized, x = layer(4, 64), torch.randn(1, IN).bfloat16()
    with torch.no_grad():
        before = quantized(x)
        quantized.scales.mul_(2)
        torch.testing.assert_close(quantized(x), 2 * before)
        with use_backend("reference"):
            torch.testing.assert_close(quantized(x), 2 * before)
