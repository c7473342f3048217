"""What holds for every kind of compressed layer, whatever method made it."""

import copy
import json

import pytest
import torch
from method_examples import example_layers
from safetensors.torch import load, save

from llmpress.nn.layers import KINDS, CompressedLinear, build_layer, layer_entry
from llmpress.nn.layers.base import frozen
from llmpress.nn.layers.pivoted_low_rank import PivotedLowRankLinear

OUT, IN = 33, 35
LAYERS = [
    pytest.param(layer, id=f"{kind}-{index}")
    for kind, layers in example_layers(OUT, IN).items()
    for index, layer in enumerate(layers)
]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> CompressedLinear:
    """A layer that a method's example makes."""
    return copy.deepcopy(request.param)


def test_every_kind_is_made_by_some_example() -> None:
    assert example_layers(OUT, IN).keys() == KINDS.keys()


def twin_of(
    layer: CompressedLinear, tensors: dict[str, torch.Tensor] | None, *, bias: bool = False
) -> CompressedLinear:
    entry = json.loads(json.dumps(layer_entry(layer.kind, layer.spec())))
    return build_layer(entry, layer.in_features, layer.out_features, tensors, bias=bias)


def test_an_empty_twin_is_filled_from_a_file(layer: CompressedLinear) -> None:
    twin = twin_of(layer, load(save(layer.tensors())))
    assert twin.stored_bits() == layer.stored_bits()
    torch.testing.assert_close(twin.dequantize(), layer.dequantize(), rtol=0, atol=0)


def test_weight_and_output_have_the_shape_and_the_dtype_they_should(
    layer: CompressedLinear,
) -> None:
    assert layer.dequantize().shape == (OUT, IN)
    for dtype in (torch.float32, torch.bfloat16):
        output = layer(torch.randn(2, 3, IN, dtype=dtype))
        assert output.shape == (2, 3, OUT)
        assert output.dtype == dtype


def test_bias_is_added(layer: CompressedLinear) -> None:
    bias = torch.randn(OUT)
    twin = twin_of(layer, {**layer.tensors(), "bias": bias}, bias=True)
    x = torch.randn(4, IN)
    torch.testing.assert_close(twin(x), layer(x) + bias)
    assert twin.stored_bits() == layer.stored_bits() + 32 * OUT


def test_only_named_tensors_train_and_they_get_the_gradient_of_the_weight(
    layer: CompressedLinear,
) -> None:
    assert set(layer.trainable) <= dict(layer.named_parameters()).keys()
    assert not any(p.requires_grad for p in layer.parameters())
    for name in layer.trainable:
        # float32 twins, so that a finite step is not lost in half precision
        parameter = layer.get_parameter(name)
        setattr(layer, name, frozen(parameter.detach().float()).requires_grad_(True))
    if not layer.trainable:
        return
    target = torch.randn(OUT, IN)
    (layer.dequantize().float() * target).sum().backward()
    for name in layer.trainable:
        parameter = layer.get_parameter(name)
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            before = (layer.dequantize().float() * target).sum()
            parameter += 1e-2 * direction
            change = (layer.dequantize().float() * target).sum() - before
            parameter -= 1e-2 * direction
        expected = 1e-2 * (parameter.grad * direction).sum()
        torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-3)


def test_size_is_shown(layer: CompressedLinear) -> None:
    assert f"bits/weight={layer.stored_bits() / (OUT * IN):.3f}" in repr(layer)


def test_unknown_kinds_and_specs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'cubic' .*codebook"):
        build_layer(layer_entry("cubic", {}), 3, 3)
    with pytest.raises(ValueError, match=r"sign.*rank"):
        build_layer(layer_entry("sign", {"rank": 2}), 3, 3)
    with pytest.raises(ValueError, match="0"):
        build_layer(layer_entry("sign", {}), 0, 3)


@pytest.mark.parametrize("rank", [1, 4, OUT])
def test_pivoted_rows_are_rows_of_the_product(rank: int) -> None:
    A, B = torch.randn(OUT, rank), torch.randn(rank, IN)
    layer = PivotedLowRankLinear.from_factors(A, B, dtype="float32")
    torch.testing.assert_close(layer.dequantize(), A @ B, rtol=1e-4, atol=1e-5)
    assert sorted(layer.place.tolist()) == list(range(OUT))
    stored = layer.dequantize()[layer.place.long().argsort()[:rank]]
    torch.testing.assert_close(stored, layer.B, rtol=0, atol=0)
    assert layer.A.shape == (OUT - rank, rank)


def test_factors_without_the_rank_they_claim_are_refused() -> None:
    A = torch.randn(OUT, 1).expand(OUT, 3)
    with pytest.raises(ValueError, match="3"):
        PivotedLowRankLinear.from_factors(A, torch.randn(3, IN))


@pytest.mark.parametrize("tokens", [3, 64])  # fewer and more than the rank
def test_pivoted_rows_get_the_same_outputs_and_gradients_at_any_number_of_tokens(
    tokens: int,
) -> None:
    factors = torch.randn(24, 8), torch.randn(8, 16)
    layer = PivotedLowRankLinear.from_factors(*factors, "float32")
    layer.A.requires_grad_(True)
    layer.B.requires_grad_(True)
    x, given = torch.randn(tokens, 16), torch.randn(tokens, 24)
    y = layer(x)
    y.backward(given)
    found = layer.A.grad.clone(), layer.B.grad.clone()
    layer.zero_grad()
    expected = x @ layer.dequantize().t()
    expected.backward(given)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, (layer.A.grad, layer.B.grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "spec", "numbers"),
    [
        ("quantized", {"num_bits": 3, "group_size": 64}, {"Bits of a weight's code": 3}),
        (
            "codebook",
            {"num_entries": 512, "vector_size": 4, "dtype": "float16"},
            {
                "Bits of a weight's code": 2.25,
                "Codebook entries K": 512,
                "Codebook vector length d": 4,
            },
        ),
        (
            "mixed_low_rank",
            {
                "groups": [
                    {"rank": 8, "num_bits": 8},
                    {"rank": 64, "num_bits": 2},
                    {"rank": 2, "num_bits": 2},
                ],
                "group_size": 64,
            },
            {
                "Rank": 74,
                "Rank, % of the full rank": 100 * 74 / 576,
                "Rank at 8 bits": 8,
                "Rank at 2 bits": 66,
            },
        ),
        (
            "sparse",
            {"num_nonzeros": 6635, "index": "columns"},
            {"Weights kept, %": 100 * 6635 / (576 * 1152)},
        ),
        ("sign", {}, {}),
    ],
)
def test_a_layer_says_what_it_was_given(kind: str, spec: dict, numbers: dict) -> None:
    assert KINDS[kind].empty((576, 1152), **spec).allocation() == pytest.approx(numbers)


@pytest.mark.parametrize("kind", ["low_rank", "pivoted_low_rank"])
def test_factors_say_their_rank(kind: str) -> None:
    given = KINDS[kind].empty((576, 1152), rank=144, dtype="float16").allocation()
    assert given == {"Rank": 144, "Rank, % of the full rank": 25}
