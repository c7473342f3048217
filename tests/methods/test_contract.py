"""What every method must do. A new method is found by its package, its examples by its test."""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from method_examples import Example, examples_of
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.nn import functional

from llmpress.methods.base import InputStatistics, Method, Shape, Work
from llmpress.methods.registry import known_methods, method_class
from llmpress.nn.layers import CompressedLinear, build_layer, layer_entry
from llmpress.numerics.linalg import relative_output_error, relative_weight_error

SHAPES = [(1, 1), (1, 7), (5, 1), (17, 33), (64, 40), (24, 130), (130, 24)]
EXAMPLES = {name: examples_of(name) for name in known_methods()}
CASES = [
    pytest.param(name, example, id=f"{name}-{index}")
    for name, of in EXAMPLES.items()
    for index, example in enumerate(of.examples)
]
STEPS = [
    pytest.param(name, ladder, id=f"{name}-{index}")
    for name, of in EXAMPLES.items()
    for index, ladder in enumerate(of.ladders)
]
BETTER = [
    pytest.param(name, *row, id=f"{name}-{row[1]}-{index}")
    for name, of in EXAMPLES.items()
    for index, row in enumerate(of.better_than)
]


@dataclass(frozen=True)
class Layer:
    """A weight and its inputs as real layers have them.

    Attributes:
        weight: ``[out, in]``: low rank plus noise, with a few large entries.
        statistics: Of inputs in which few directions and a few outlier channels dominate.
    """

    weight: Tensor
    statistics: InputStatistics
    seed: int = field(default=0)


def realistic_layer(out_features: int, in_features: int, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rank = max(1, in_features // 6)
    inputs = normal(512, rank) @ normal(rank, in_features) / rank**0.5
    inputs += 0.3 * normal(512, in_features)
    inputs[:, :: max(1, in_features // 3)] *= 8
    weight = normal(out_features, in_features)
    weight += 2 * normal(out_features, 2) @ normal(2, in_features)
    weight[normal(out_features, in_features) > 3] *= 5
    moment = inputs.T @ inputs / len(inputs)
    return Layer(0.05 * weight, InputStatistics(moment, len(inputs)))


def with_and_without(layer: Layer, example: Example) -> Iterator[InputStatistics | None]:
    yield layer.statistics
    if not example.needs_statistics:
        yield None


def compressed(name: str, example: Example, layer: Layer) -> list[CompressedLinear]:
    """The layer compressed with and without statistics; empty where it may be and is refused."""
    method = method_class(name)(**example.settings)
    try:
        return [
            method.compress(layer.weight, statistics, seed=3)
            for statistics in with_and_without(layer, example)
        ]
    except ValueError:
        if layer.weight.numel() >= example.may_refuse:
            raise
        return []


@pytest.mark.parametrize("name", known_methods())
def test_method_is_frozen_and_hashable(name: str) -> None:
    assert EXAMPLES[name].examples
    for example in EXAMPLES[name].examples:
        method = method_class(name)(**example.settings)
        assert method == method_class(name)(**example.settings)
        with pytest.raises(AttributeError):
            method.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "example"), CASES)
def test_disk_keeps_every_bit(
    name: str, example: Example, shape: tuple[int, int], tmp_path: Path
) -> None:
    for layer in compressed(name, example, realistic_layer(*shape)):
        file = tmp_path / "layer.safetensors"
        save_file(layer.tensors(), file)
        header_bytes = struct.unpack("<Q", file.read_bytes()[:8])[0]
        assert layer.stored_bits() == 8 * (file.stat().st_size - 8 - header_bytes)
        entry = json.loads(json.dumps(layer_entry(layer.kind, layer.spec())))
        twin = build_layer(entry, layer.in_features, layer.out_features, load_file(file))
        torch.testing.assert_close(twin.dequantize(), layer.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "example"), CASES)
def test_output_is_that_of_the_dequantized_weight(
    name: str, example: Example, shape: tuple[int, int]
) -> None:
    for layer in compressed(name, example, realistic_layer(*shape)):
        weight = layer.dequantize()
        assert weight.shape == shape
        assert bool(torch.isfinite(weight).all())
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, shape[1]).to(dtype)
            output = layer(x)
            assert output.dtype == dtype
            expected = functional.linear(x.float(), weight.float())
            tolerance = 0.02 * float(expected.abs().max())  # three roundings to bfloat16
            torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_same_seed_same_bytes_and_inputs_unmodified(name: str, example: Example) -> None:
    layer = realistic_layer(48, 60)
    weight, moment = layer.weight.clone(), layer.statistics.second_moment.clone()
    first, again = (compressed(name, example, layer) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert save(one.tensors()) == save(other.tensors())
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.statistics.second_moment, moment, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "example"), CASES)
def test_any_float_dtype_and_layout_is_taken(
    name: str, example: Example, dtype: torch.dtype
) -> None:
    layer = realistic_layer(48, 60)
    weight = layer.weight.to(dtype)
    transposed = weight.T.contiguous().T
    as_float = compressed(name, example, Layer(weight.float(), layer.statistics))
    other = compressed(name, example, Layer(transposed, layer.statistics))
    for one, same in zip(as_float, other, strict=True):
        torch.testing.assert_close(one.dequantize(), same.dequantize(), rtol=1e-2, atol=1e-3)
        assert one.stored_bits() == same.stored_bits()


@pytest.mark.parametrize(("name", "example"), CASES)
def test_a_small_delta_is_as_good_as_a_weight(name: str, example: Example) -> None:
    layer = realistic_layer(48, 60)
    delta = Layer(layer.weight * 1e-3, layer.statistics)
    for large, small in zip(
        compressed(name, example, layer), compressed(name, example, delta), strict=True
    ):
        error = relative_weight_error(layer.weight, large.dequantize())
        assert (
            relative_weight_error(delta.weight, small.dequantize()) < 1.2 * error + 5e-4
        )  # fp16 scales are coarse there


@pytest.mark.parametrize(("name", "example"), CASES)
def test_constant_weights_and_dead_inputs_are_safe(name: str, example: Example) -> None:
    layer = realistic_layer(48, 60)
    moment = layer.statistics.second_moment.clone()
    moment[10:20] = 0
    moment[:, 10:20] = 0
    dead = InputStatistics(moment, layer.statistics.num_tokens)
    for weight in (torch.zeros(48, 60), torch.full((48, 60), -0.25), layer.weight):
        for result in compressed(name, example, Layer(weight, dead)):
            dequantized = result.dequantize()
            assert bool(torch.isfinite(dequantized).all())
            if not weight.any():
                torch.testing.assert_close(dequantized.float(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "ladder"), STEPS)
def test_more_bits_never_a_larger_error(name: str, ladder: list[dict[str, Any]]) -> None:
    layer = realistic_layer(96, 160)
    bits, errors = [], []
    for settings in ladder:
        result = method_class(name)(**settings).compress(layer.weight, layer.statistics)
        bits.append(result.stored_bits())
        errors.append(error_of(result, layer, method_class(name)))
    assert bits == sorted(set(bits)), f"sizes do not rise: {bits}"
    assert errors == sorted(errors, reverse=True), f"errors do not fall: {errors}"


def error_of(result: CompressedLinear, layer: Layer, method: type[Method]) -> float:
    """The error that the method minimises: of the outputs where it uses statistics."""
    weight = result.dequantize()
    if method.uses_statistics:
        return relative_output_error(layer.weight, weight, layer.statistics.second_moment)
    return relative_weight_error(layer.weight, weight)


@pytest.mark.parametrize(
    ("name", "settings", "baseline", "baseline_settings"),
    BETTER,
)
def test_better_than_the_baseline_at_no_more_bits(
    name: str, settings: dict[str, Any], baseline: str, baseline_settings: dict[str, Any]
) -> None:
    layer = realistic_layer(192, 288)
    result = method_class(name)(**settings).compress(layer.weight, layer.statistics)
    simple = method_class(baseline)(**baseline_settings).compress(layer.weight, layer.statistics)
    assert result.stored_bits() <= simple.stored_bits()
    moment = layer.statistics.second_moment
    error = relative_output_error(layer.weight, result.dequantize(), moment)
    assert error < relative_output_error(layer.weight, simple.dequantize(), moment)


BAD_WEIGHTS = {
    "nan": torch.tensor([[0.0, float("nan")], [1.0, 2.0]]),
    "inf": torch.tensor([[0.0, float("inf")], [1.0, 2.0]]),
    "empty": torch.empty(0, 4),
    "vector": torch.randn(4),
    "batch": torch.randn(2, 2, 2),
    "integers": torch.ones(2, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
@pytest.mark.parametrize(("name", "example"), CASES)
def test_bad_weights_are_refused(name: str, example: Example, bad: str) -> None:
    method = method_class(name)(**example.settings)
    statistics = InputStatistics(torch.eye(BAD_WEIGHTS[bad].shape[-1]), 100)
    with pytest.raises(ValueError, match="weight"):
        method.compress(BAD_WEIGHTS[bad], statistics)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_missing_or_unfit_statistics_are_refused(name: str, example: Example) -> None:
    method = method_class(name)(**example.settings)
    layer = realistic_layer(48, 60)
    assert (method.need == "needed") == example.needs_statistics
    assert method.uses_statistics or method.need == "not used"
    if not example.needs_statistics:
        assert not method.requires_statistics
        return
    nan = InputStatistics(torch.full((60, 60), float("nan")), 100)
    for statistics in (None, InputStatistics(torch.eye(59), 100), nan):
        with pytest.raises(ValueError, match="statistics"):
            method.compress(layer.weight, statistics)


@pytest.mark.parametrize(("name", "example"), CASES)
def test_statistics_that_are_not_used_change_nothing(name: str, example: Example) -> None:
    method = method_class(name)(**example.settings)
    if method.need != "not used":
        return
    layer = realistic_layer(48, 60)
    alone, known = (method.compress(layer.weight, s) for s in (None, layer.statistics))
    assert not method.spreads_budget
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(known.tensors()[key], tensor, rtol=0, atol=0)


BUDGETED = [n for n in known_methods() if "bits" in {f.name for f in fields(method_class(n))}]
SHAPES = {"wide": Shape(24, 64), "tall": Shape(96, 32), "small": Shape(16, 16)}


@pytest.mark.parametrize("name", BUDGETED)
def test_the_smallest_budget_is_named_and_enough_for_all_layers(name: str) -> None:
    cls, others = method_class(name), EXAMPLES[name].smallest
    with pytest.raises(ValueError, match=r"bits=0\.11") as caught:
        cls(bits=0.11, **others).plan(SHAPES, 1)
    found = re.search(r"(\d+\.\d+) bits", str(caught.value))
    assert found is not None
    enough = cls(bits=float(found[1]), **others)
    stored, weights = 0, 0
    for layer, settings in enough.plan(SHAPES, 1).items():
        weight = torch.randn(*SHAPES[layer])
        assert settings is not None
        stored += settings.compress(weight).stored_bits()
        weights += weight.numel()
    assert stored <= float(found[1]) * weights
    less = cls(bits=float(found[1]) * 0.99, **others)
    with pytest.raises(ValueError, match="bits="):
        less.plan(SHAPES, 1)
    with pytest.raises(ValueError, match="bits"):
        less.compress(torch.randn(*SHAPES["small"]))


def test_unknown_methods_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'gtpq'.* 'gptq'"):
        method_class("gtpq")


@pytest.mark.parametrize("shape", [(64, 40), (24, 130), (130, 24)], ids=str)
@pytest.mark.parametrize(("name", "example"), CASES)
def test_the_empty_layer_is_what_compress_makes(
    name: str, example: Example, shape: tuple[int, int]
) -> None:
    method = method_class(name)(**example.settings)
    empty = method.empty_layer(Shape(*shape))
    assert all(tensor.is_meta for tensor in empty.tensors().values())
    assert method.work(Shape(*shape)) != Work()
    assert method.workspace_bytes(Shape(*shape)) >= 4 * math.prod(shape)
    for layer in compressed(name, example, realistic_layer(*shape)):
        assert type(layer) is type(empty)
        if method.size_from_shape:
            assert layer.spec() == empty.spec()
        assert empty.stored_bits() == pytest.approx(layer.stored_bits(), rel=0.1)


def test_a_method_that_says_nothing_of_its_layer_shows_it() -> None:
    class Plain(method_class("rtn")):  # type: ignore[misc]
        empty_layer = Method.empty_layer

    plain, told = (cls(3, 16).empty_layer(Shape(20, 30)) for cls in (Plain, method_class("rtn")))
    assert plain.spec() == told.spec()
    assert all(tensor.is_meta for tensor in plain.tensors().values())
