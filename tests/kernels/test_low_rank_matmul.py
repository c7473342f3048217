"""Two factors in one launch, against the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_examples import DTYPES, check_close

from llmpress.kernels.dispatch import use_backend
from llmpress.kernels.low_rank_matmul import MOST_ROWS, low_rank_matmul

Both = Callable[[Callable[[], Any]], tuple[Any, Any]]
# rows, in, out, rank; the last one takes two plain products
CASES = [
    (1, 70, 50, 21),
    (5, 150, 200, 16),
    (64, 33, 1, 40),
    (3, 1, 130, 1),
    (MOST_ROWS + 1, 9, 8, 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_computes_the_formula(
    case: tuple[int, int, int, int],
    stored: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    both: Both,
) -> None:
    rows, inputs, outputs, rank = case
    A = torch.randn(outputs, rank, device=device).to(stored)
    B = torch.randn(rank, inputs, device=device).to(stored)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    found, expected = both(lambda: low_rank_matmul(x, A, B))
    check_close(found, expected, dtype, roundings=2)  # between the factors too


def test_gradients_reach_inputs_and_factors(device: torch.device) -> None:
    leaves = [
        torch.randn(shape, device=device, requires_grad=True) for shape in ((4, 9), (7, 3), (3, 9))
    ]
    with use_backend("triton"):
        torch.library.opcheck(low_rank_matmul, leaves)
        low_rank_matmul(*leaves).square().sum().backward()
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, A, B = copies
    (x @ B.t() @ A.t()).square().sum().backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)
