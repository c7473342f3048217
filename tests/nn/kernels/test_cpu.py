"""Products of the library compiled for this CPU, at every instruction set, against the formulas."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_examples import DTYPES, ROUNDING, random_codebook, random_codes, random_delta
from torch import Tensor

from llmpress.core.errors import ConfigError
from llmpress.nn.kernels import cpu
from llmpress.nn.kernels.codebook_matmul.reference import codebook_matmul_reference, codebook_weight
from llmpress.nn.kernels.delta_matmul import PackedDeltas, RowOwners, delta_matmul
from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.kernels.quantized_matmul.reference import (
    quantized_matmul_reference,
    quantized_weight,
)
from llmpress.nn.layers import CompressedLinear, keep_dense
from llmpress.nn.layers.sign import SignLinear
from llmpress.nn.packing import code_width, pack

if isinstance(cpu.loaded(), str):
    pytest.skip(f"no compiled library: {cpu.loaded()}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")
HERE = torch.device("cpu")
ROWS = (1, 2, 3, 5, 8, 9, 16)
# in, out, group: one, odd sizes, a short last group, groups smaller than a vector, one group
PACKED = [(1, 1, 1), (70, 50, 16), (64, 48, 64), (33, 7, 5), (130, 3, 128), (17, 65, 100)]


@pytest.fixture(params=cpu.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that this processor has."""
    with cpu.use_level(request.param) as found:
        if found != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield found


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with what fp32 gives; in fp32 more closely than kernels of a GPU are."""
    assert found.dtype == expected.dtype == dtype
    tolerance = 3e-6 if dtype == torch.float32 else ROUNDING[dtype]
    atol = tolerance * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=atol)


def packed(inputs: int, outputs: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = outputs, -(-inputs // group)
    return (
        pack(torch.randint(0, 1 << bits, (outputs, inputs)), bits),
        (torch.rand(shape) + 0.1).half(),
        pack(torch.randint(0, 1 << bits, shape), bits),
    )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", PACKED, ids=str)
def test_packed_weights(shape: tuple[int, int, int], bits: int) -> None:
    inputs, outputs, group = shape
    stored = packed(inputs, outputs, bits, group)
    for dtype in DTYPES:
        for rows in ROWS if bits in (3, 6) else (1, 7):
            x = torch.randn(rows, inputs).to(dtype)
            expected = quantized_matmul_reference(x, *stored, bits, group)
            check(cpu.packed_matmul(x, *stored, bits, group), expected, dtype)
        weight = cpu.packed_weight(*stored, bits, group, inputs, dtype)
        expected = quantized_weight(*stored, bits, group, inputs).to(dtype)
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 6, 8, 11, 16, 33])
def test_codebooks_of_every_width(d: int, dtype: torch.dtype) -> None:
    inputs, outputs = 37, 70
    for bits in range(1, 17):
        K = (1 << bits) - (bits % 3 == 0 and bits > 1)
        codes = random_codes(K, inputs * -(-outputs // d), HERE)
        codebook = random_codebook(K, d, dtype, HERE)
        scales = (torch.rand(outputs) + 0.1).half() if dtype == torch.int8 else None
        x = torch.randn(ROWS[bits % len(ROWS)], inputs)
        stored = codes, codebook, scales
        expected = codebook_matmul_reference(x, *stored, outputs)
        check(cpu.codebook_matmul(x, *stored, outputs, code_width(K)), expected, torch.float32)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(1, 1, 1, 5), (257, 300, 4096, 4), (65, 17, 300, 3)], ids=str)
def test_codebooks_at_odd_shapes(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, outputs, K, d = case
    codes = random_codes(K, inputs * -(-outputs // d), HERE)
    scales = (torch.rand(outputs) + 0.1).half()
    stored = codes, random_codebook(K, d, torch.int8, HERE), scales
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        expected = codebook_matmul_reference(x, *stored, outputs)
        check(cpu.codebook_matmul(x, *stored, outputs, code_width(K)), expected, dtype)
    found = cpu.transposed_codebook_weight(*stored, inputs, outputs, code_width(K), dtype)
    expected = codebook_weight(*stored, inputs, outputs).t().to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("level")
def test_codes_that_no_entry_has_read_no_memory_that_is_not_theirs() -> None:
    codes = pack(torch.full((6 * 8,), 15), 4)
    codebook = torch.randn(9, 3)
    found = cpu.codebook_matmul(torch.ones(1, 6), codes, codebook, None, 24, 4)
    torch.testing.assert_close(found, 6 * codebook[8].repeat(8)[None], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [(1, 1), (50, 70), (33, 130)], ids=str)
def test_signs(shape: tuple[int, int]) -> None:
    layer = SignLinear.from_signs(torch.rand(shape) > 0.5, torch.tensor(0.3))
    for dtype in DTYPES:
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(dtype)
            expected = (x.float() @ layer.dequantize().t()).to(dtype)
            check(cpu.sign_matmul(x, layer.signs, float(layer.scale), shape[0]), expected, dtype)
        found = cpu.sign_weight(layer.signs, float(layer.scale), *shape, dtype)
        torch.testing.assert_close(found, layer.dequantize().to(dtype), rtol=0, atol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 3, 70), (40, 33, 33)], ids=str)
def test_thin_factors(shape: tuple[int, int, int], stored: torch.dtype) -> None:
    outputs, rank, inputs = shape
    A, B = torch.randn(outputs, rank).to(stored), torch.randn(rank, inputs).to(stored)
    for dtype in DTYPES:
        for rows in ROWS:
            x = torch.randn(rows, inputs).to(dtype)
            expected = x.float() @ B.float().t()
            check(cpu.dense_matmul(x, B), expected.to(dtype), dtype)
            expected = (expected @ A.float().t()).to(dtype)
            check(cpu.low_rank_matmul(x, A, B), expected, dtype)


@pytest.mark.usefixtures("level")
def test_results_depend_neither_on_threads_nor_on_what_else_is_multiplied() -> None:
    stored = packed(640, 500, 3, 64)
    codes, entries = random_codes(512, 640 * 125, HERE), random_codebook(512, 4, torch.int8, HERE)
    scales, x = torch.ones(500).half(), torch.randn(16, 640)
    before, results = torch.get_num_threads(), []
    try:
        for threads, count in ((1, 16), (2, 16), (3, 1), (1, 5)):
            torch.set_num_threads(threads)
            parts = x.split(count)
            results.append(
                [
                    torch.cat([cpu.packed_matmul(part, *stored, 3, 64) for part in parts]),
                    torch.cat(
                        [cpu.codebook_matmul(p, codes, entries, scales, 500, 9) for p in parts]
                    ),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [16, 7, 64])
@pytest.mark.parametrize(
    "tenants", [[0], [1, -1, 0, 2, 1], [3] * 15, [-1, 2], [0, 1, 3] * 5], ids=str
)
def test_each_row_gets_its_own_delta(
    tenants: list[int], group_size: int, dtype: torch.dtype
) -> None:
    shape = 150, 70
    groups = [[(2, 8), (5, 3), (20, 2)], [(1, 5), (17, 1)], [], [(3, 7), (1, 6), (4, 4)]]
    deltas = [random_delta(each, shape, group_size, HERE) for each in groups]
    x, y = (torch.randn(len(tenants), n).to(dtype) for n in reversed(shape))
    before, rows = y.clone(), (PackedDeltas(deltas, group_size), RowOwners(tenants))
    found = delta_matmul(x, y, *rows)
    with use_backend("reference"):
        expected = delta_matmul(x, y, *rows)
    check(found, expected, dtype)
    untouched = [row for row, tenant in enumerate(tenants) if tenant in (-1, 2)]
    torch.testing.assert_close(found[untouched], y[untouched], rtol=0, atol=0)
    torch.testing.assert_close(y, before, rtol=0, atol=0)


def test_only_what_is_used_without_gradients_computes_packed(
    example_layer: CompressedLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = example_layer, torch.randn(2, example_layer.in_features)
    assert not layer.computes_packed(x)  # it compresses
    keep_dense(layer)
    assert layer.computes_packed(x)
    expected = x @ layer.dequantize().t()
    assert not layer.computes_packed(x.double())
    assert not layer.computes_packed(x.clone().requires_grad_())
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(type(layer), "dequantize", None)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    many = torch.randn(70, layer.in_features)
    torch.testing.assert_close(layer(many), many @ layer.dequantize().t(), rtol=1e-5, atol=1e-4)
    assert layer.dense_store.held == 0
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.dequantize().sum(0).expand(2, -1))


@pytest.fixture(
    params=["codebook", "low_rank", "mixed_low_rank", "pivoted_low_rank", "quantized", "sign"]
)
def example_layer(request: pytest.FixtureRequest) -> CompressedLinear:
    """A layer of each kind that the library has a product for."""
    from method_examples import example_layers

    return example_layers(48, 40)[request.param][0]


@pytest.mark.parametrize(("value", "expected"), [("off", "off"), ("plain", "plain")])
def test_the_environment_chooses(value: str, expected: str) -> None:
    command = "from llmpress.nn.kernels import cpu; print(cpu.description(), bool(cpu.library()))"
    told = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, cpu.VARIABLE: value},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert expected in told
    assert told.endswith(f"{value != 'off'}\n")


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "mmx")
    with pytest.raises(ConfigError, match=f"{cpu.VARIABLE}=mmx"):
        cpu.loaded.__wrapped__()
