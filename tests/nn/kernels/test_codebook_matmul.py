"""Products with codebook weights and their gradients, against the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_examples import DTYPES, check_close, random_codebook, random_codes

from llmpress.nn.kernels.codebook_grad import codebook_grad
from llmpress.nn.kernels.codebook_matmul import codebook_matmul
from llmpress.nn.kernels.dispatch import use_backend

Both = Callable[[Callable[[], Any]], tuple[Any, Any]]
# rows, in, out, K, d: all paths (one row, tensor cores, several tiles of each), odd sizes, padding
CASES = [
    (1, 70, 50, 37, 3),
    (1, 300, 257, 4096, 4),
    (5, 33, 40, 256, 8),
    (20, 64, 130, 2, 2),
    (70, 40, 36, 16, 1),
    (3, 1, 1, 1, 5),
    (2, 17, 65, 65536, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_computes_the_formula(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, both: Both
) -> None:
    rows, inputs, outputs, K, d = case
    codes = random_codes(K, inputs * -(-outputs // d), device)
    codebook = random_codebook(K, d, torch.float16, device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    found, expected = both(lambda: codebook_matmul(x, codes, codebook, None, outputs))
    check_close(found, expected, dtype)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_width(bits: int, device: torch.device, both: Both) -> None:
    codes = random_codes(1 << bits, 41 * 7, device)
    codebook = random_codebook(1 << bits, 3, torch.float32, device)
    x = torch.randn(1, 41, device=device)
    found, expected = both(lambda: codebook_matmul(x, codes, codebook, None, 20))
    check_close(found, expected, torch.float32)


def test_codes_may_lie_anywhere_in_memory(device: torch.device, both: Both) -> None:
    codes = random_codes(40_000, 41 * 7, device)  # 16 bits, read as words
    buffer = torch.empty(len(codes) + 1, dtype=torch.uint8, device=device)
    buffer[1:] = codes
    codebook = random_codebook(40_000, 3, torch.float32, device)
    x, gradient = torch.randn(2, 41, device=device), torch.randn(2, 20, device=device)
    found, expected = both(lambda: codebook_matmul(x, buffer[1:], codebook, None, 20))
    check_close(found, expected, torch.float32)
    found, expected = both(lambda: codebook_grad(x, gradient, buffer[1:], 40_000, 3))
    check_close(found, expected, torch.float32)


@pytest.mark.parametrize("rows", [1, 6])
def test_integer_codebooks_in_units_of_scales(rows: int, device: torch.device, both: Both) -> None:
    codes = random_codes(200, 48 * 15, device)
    codebook = random_codebook(200, 4, torch.int8, device)
    scales = (torch.rand(57, device=device) + 0.1).half()
    x = torch.randn(rows, 48, device=device).bfloat16()
    found, expected = both(lambda: codebook_matmul(x, codes, codebook, scales, 57))
    check_close(found, expected, torch.bfloat16)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.usefixtures("poisoned")
def test_sums_in_parts_are_the_same_sums(
    splits: int, device: torch.device, both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmpress.nn.kernels.codebook_matmul import triton as kernel

    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)
    codes = random_codes(64, 200 * 10, device)
    codebook, x = random_codebook(64, 4, torch.float16, device), torch.randn(2, 200, device=device)
    found, expected = both(lambda: codebook_matmul(x, codes, codebook, None, 40))
    check_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_entries_are_added_up(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, both: Both
) -> None:
    rows, inputs, outputs, K, d = case
    codes = random_codes(K, inputs * -(-outputs // d), device)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    gradient = torch.randn(rows, outputs, device=device).to(dtype)
    found, expected = both(lambda: codebook_grad(x, gradient, codes, K, d))
    assert found.dtype == torch.float32
    check_close(found, expected, torch.float32, roundings=4)


def test_autograd_of_the_kernel_is_that_of_the_formula(device: torch.device) -> None:
    codes, codebook = (
        random_codes(19, 30 * 7, device),
        random_codebook(19, 3, torch.float32, device),
    )
    scales = torch.rand(20, device=device) + 0.1
    x = torch.randn(4, 30, device=device)
    with use_backend("triton"):
        torch.library.opcheck(codebook_matmul, (x, codes, codebook, scales, 20))
        found = _gradients(x, codes, codebook, scales)
    indices = torch.arange(30 * 7, device=device)
    from llmpress.nn.packing import unpack

    leaves = [t.clone().requires_grad_() for t in (x, codebook, scales)]
    vectors = leaves[1][unpack(codes, 5, len(indices)).long()]
    weight = vectors.view(30, -1)[:, :20].t() * leaves[2].unsqueeze(1)
    (leaves[0] @ weight.t()).square().sum().backward()
    for leaf, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-4)


def _gradients(*tensors: torch.Tensor) -> list[torch.Tensor | None]:
    x, codes, codebook, scales = (t.clone() for t in tensors)
    for leaf in (x, codebook, scales):
        leaf.requires_grad_()
    codebook_matmul(x, codes, codebook, scales, 20).square().sum().backward()
    return [x.grad, codebook.grad, scales.grad]
