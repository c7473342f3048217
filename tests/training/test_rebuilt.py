"""Layers that rebuild their weight: the same numbers, no dense weight kept, sums over codes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmpress.nn.layers import CompressedLinear, DenseStore
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.nn.layers.mixed_low_rank import MixedLowRankLinear, Vectors
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.nn.packing import unpack
from llmpress.training.trainables import rebuilding

SHAPES = [(12, 8, 4), (7, 10, 3), (1, 1, 1), (33, 5, 8)]


def codebook_layer(inputs: int, outputs: int, size: int, *, bias: bool = False) -> CodebookLinear:
    codes = torch.randint(5, (inputs * -(-outputs // size),))
    layer = CodebookLinear.from_codes(codes, torch.randn(5, size), inputs, outputs, "float32")
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs))
    layer.codebook.requires_grad = True
    layer.keep_unpacked(True)
    return layer


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inputs", "outputs", "size"), SHAPES, ids=str)
def test_gradients_are_sums_over_the_codes(
    inputs: int, outputs: int, size: int, bias: bool
) -> None:
    layer = codebook_layer(inputs, outputs, size, bias=bias)
    x = torch.randn(2, 3, inputs, requires_grad=True)
    upstream = torch.randn(2, 3, outputs)
    expected_y = layer(x).detach()
    with rebuilding([layer]):
        y = layer(x)
        y.backward(upstream)
    torch.testing.assert_close(y.detach(), expected_y)
    weight = layer.dequantize().detach()
    torch.testing.assert_close(x.grad, upstream @ weight)
    of_weight = upstream.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    padded = torch.zeros(inputs, -(-outputs // size) * size, dtype=torch.float64)
    padded[:, :outputs] = of_weight.t()
    reference = torch.zeros(5, size, dtype=torch.float64)
    codes = unpack(layer.codes, layer.code_bits, layer.num_vectors)
    for code, vector in zip(codes.tolist(), padded.view(-1, size), strict=True):
        reference[code] += vector
    assert layer.codebook.grad is not None
    torch.testing.assert_close(layer.codebook.grad.double(), reference, atol=1e-5, rtol=1e-5)


def test_autocast_computes_and_answers_as_plain_layers_do() -> None:
    layer = codebook_layer(12, 8, 4)
    x = torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with rebuilding([layer]):
            y = layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def kept_between_passes(layer: CompressedLinear, x: Tensor) -> list[int]:
    """How many numbers each tensor holds that autograd keeps for the backward pass."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return kept


def test_no_dense_weight_is_kept() -> None:
    layer = codebook_layer(40, 48, 4)
    x = torch.randn(2, 40, requires_grad=True)
    assert max(kept_between_passes(layer, x)) >= 40 * 48 // 4
    with rebuilding([layer]):
        assert max(kept_between_passes(layer, x)) <= x.numel()


def triplets(*, bias: bool = False) -> MixedLowRankLinear:
    """Three triplets at 4 bits and two unquantized ones, everything that may train training."""
    quantized = [
        Vectors(
            torch.randint(16, (3, n)), torch.rand(3, -(-n // 8)), torch.full((3, -(-n // 8)), 7)
        )
        for n in (20, 12)
    ]
    plain = [Vectors(torch.randn(2, n)) for n in (20, 12)]
    layer = MixedLowRankLinear.from_vectors(
        [plain[0], quantized[0]],
        [plain[1], quantized[1]],
        torch.rand(5),
        0.25,
        num_bits=[16, 4],
        group_size=8,
        shape=(12, 20),
    )
    if bias:
        layer.bias = nn.Parameter(torch.randn(12))
    for name in layer.trainable:
        parameter = layer.get_parameter(name)
        parameter.data = parameter.data.float()
        parameter.requires_grad = True
    return layer


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_factors_give_what_the_dense_weight_gives(bias: bool) -> None:
    layer = triplets(bias=bias)
    assert layer.trainable == ("V0", "U0", "V1_scales", "U1_scales")
    trained = [layer.get_parameter(name) for name in layer.trainable]
    x, upstream = torch.randn(2, 3, 20, requires_grad=True), torch.randn(2, 3, 12)
    dense = functional.linear(x, layer.dequantize(), layer.bias)
    expected = torch.autograd.grad(dense, [x, *trained], upstream)
    with rebuilding([layer]):
        y = layer(x)
        found = torch.autograd.grad(y, [x, *trained], upstream)
    torch.testing.assert_close(y, dense)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_factors_are_unpacked_again_for_the_backward_pass() -> None:
    layer, x = triplets(), torch.randn(2, 20, requires_grad=True)
    assert max(kept_between_passes(layer, x)) >= 5 * 12
    with rebuilding([layer]):
        assert max(kept_between_passes(layer, x), default=0) <= x.numel()


def test_no_factors_are_kept_while_their_values_may_be_replaced() -> None:
    layer, x = triplets(), torch.randn(2, 20)
    store = layer.dense_store = DenseStore(1 << 20)
    with torch.no_grad(), rebuilding([layer]):
        layer(x)
        assert store.held == 0
    assert layer.dense_store is store
    with torch.no_grad():
        layer(x)
    assert store.held > 0


def test_layers_without_anything_to_train_pass_gradients_on() -> None:
    layer = QuantizedLinear(8, 4, num_bits=4, group_size=4)
    for tensor in layer.tensors().values():
        tensor.fill_(1)
    x = torch.randn(3, 8, requires_grad=True)
    with rebuilding([layer]):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 8))


@pytest.mark.parametrize("fails", [False, True], ids=["done", "error"])
def test_layers_are_left_as_they_were(fails: bool) -> None:
    layers = [codebook_layer(4, 4, 2), LowRankLinear(4, 4, rank=2)]
    with pytest.raises(ZeroDivisionError) if fails else torch.no_grad(), rebuilding(layers):
        assert all(layer.rebuilding for layer in layers)
        if fails:
            raise ZeroDivisionError
    assert not any(layer.rebuilding for layer in layers)
