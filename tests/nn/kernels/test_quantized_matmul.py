"""Products with group-quantized weights, against the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_examples import DTYPES, check_close, random_vectors

from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.kernels.quantized_matmul import quantized_matmul
from llmpress.nn.kernels.quantized_matmul.reference import quantized_weight

Both = Callable[[Callable[[], Any]], tuple[Any, Any]]
# rows, in, out, group size
CASES = [(1, 70, 50, 16), (1, 200, 33, 128), (20, 130, 65, 33), (70, 1, 1, 8)]
RUNS = [(1, 288, 70, 32), (5, 64, 40, 64), (70, 544, 65, 96)]  # whole runs of 32 codes


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.float32) for bits in range(1, 9)), *((3, d) for d in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("case", CASES + RUNS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_computes_the_formula(
    case: tuple[int, int, int, int],
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    both: Both,
) -> None:
    rows, inputs, outputs, group_size = case
    weight = random_vectors(outputs, inputs, bits, group_size, device)
    if inputs == 1:  # a code at its zero point would make the output zero
        weight = weight._replace(zero_points=torch.full_like(weight.zero_points, 255))
        weight = weight._replace(codes=torch.zeros_like(weight.codes))
    x = torch.randn(rows, inputs, device=device).to(dtype)
    found, expected = both(lambda: quantized_matmul(x, *weight, bits, group_size))
    check_close(found, expected, dtype)


def test_codes_may_lie_anywhere_in_memory(device: torch.device, both: Both) -> None:
    weight, x = random_vectors(20, 64, 3, 32, device), torch.randn(1, 64, device=device)
    buffer = torch.empty(len(weight.codes) + 1, dtype=torch.uint8, device=device)
    buffer[1:] = weight.codes
    moved = weight._replace(codes=buffer[1:])
    found, expected = both(lambda: quantized_matmul(x, *moved, 3, 32))
    check_close(found, expected, torch.float32)


@pytest.mark.parametrize("inputs", [300, 1120])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.usefixtures("poisoned")
def test_sums_in_parts_are_the_same_sums(
    splits: int,
    rows: int,
    inputs: int,
    device: torch.device,
    both: Both,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmpress.nn.kernels.quantized_matmul import triton as kernel

    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)
    weight = random_vectors(20, inputs, 4, 64, device)
    x = torch.randn(rows, inputs, device=device)
    found, expected = both(lambda: quantized_matmul(x, *weight, 4, 64))
    check_close(found, expected, torch.float32)


def test_gradients_reach_the_inputs(device: torch.device) -> None:
    weight = random_vectors(20, 50, 3, 16, device)
    x = torch.randn(4, 50, device=device, requires_grad=True)
    with use_backend("triton"):
        torch.library.opcheck(quantized_matmul, (x, *weight, 3, 16))
        quantized_matmul(x, *weight, 3, 16).sum().backward()
    dense = quantized_weight(weight.codes, weight.scales, weight.zero_points, 3, 16, 50)
    torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(4, 50))
