"""Products on a CPU by weights in oneDNN's order, against torch's own."""

import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional

from llmpress.nn.layers import blocked
from llmpress.nn.layers.blocked import (
    in_blocks,
    linear,
    matmul,
    multiplying_in_blocks,
    stored_bytes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (10, 6), (64, 48), (77, 191)])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 0), (2, 3), (70,)])
def test_products_are_those_of_torch(
    rows: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight = torch.randn(*rows, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    (kept,) = in_blocks([weight])
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    found, expected = linear(x, kept), functional.linear(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    weight, x = torch.randn(12, 40).to(dtype), torch.randn(12, 5).to(dtype)
    (kept,) = in_blocks([weight.t()])
    torch.testing.assert_close(linear(x.t(), kept), x.t() @ weight, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 1, 5), (0, 4, 2), (77, 191, 64)])
def test_products_of_matrices_however_they_lie(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    expected = left.double() @ right.double()
    for a, b in [(left, right), (left.t().contiguous().t(), right.t().contiguous().t())]:
        torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_brought_to_the_dtype_of_the_weight() -> None:
    x, weight = torch.randn(3, 48), torch.randn(64, 48).bfloat16()
    (kept,) = in_blocks([weight])
    torch.testing.assert_close(linear(x, kept), x.bfloat16() @ weight.t(), rtol=2**-7, atol=0.01)


def test_bytes_count_what_blocks_are_filled_up_with() -> None:
    weight = torch.randn(577, 191)
    (kept,) = in_blocks([weight])
    assert stored_bytes(weight) == weight.nbytes
    if kept.is_mkldnn:  # 640 x 192 or so
        assert weight.nbytes < stored_bytes(kept) <= 1.2 * weight.nbytes


def test_what_has_no_blocks_stays() -> None:
    tensors = [torch.randn(2, 3, 4).bfloat16(), torch.ones(3, 4).byte(), torch.empty(0, 4)]
    for given, kept in zip(tensors, in_blocks(tensors), strict=True):
        assert kept.layout == torch.strided
        torch.testing.assert_close(kept, given, rtol=0, atol=0)


def test_torch_without_onednn_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    loaded = runpy.run_path(blocked.__file__)  # as at an import
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    (kept,) = loaded["in_blocks"]([weight])
    torch.testing.assert_close(loaded["linear"](x, kept), x @ weight.t())
    torch.testing.assert_close(loaded["matmul"](x, weight.t()), x @ weight.t())


def test_linears_multiply_in_blocks_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8, bias=False))
    x = torch.randn(5, 24)
    with torch.inference_mode():
        expected = model(x)
        with multiplying_in_blocks(model):
            assert all("forward" in vars(model[index]) for index in (0, 2))
            torch.testing.assert_close(model(x), expected)
    assert not any("forward" in vars(module) for module in model)
    model(x).sum().backward()
