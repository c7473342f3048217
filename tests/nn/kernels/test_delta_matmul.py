"""Every row with its own tenant's delta, against the formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_examples import DTYPES, check_close, random_delta

from llmpress.nn.kernels.delta_matmul import PackedDeltas, RowOwners, delta_matmul
from llmpress.nn.kernels.dispatch import use_backend

Both = Callable[[Callable[[], Any]], tuple[Any, Any]]
SHAPE = (50, 70)
TENANTS = [
    [(2, 8), (5, 3), (20, 2)],  # more triplets of one precision than a program makes
    [(1, 5), (17, 1)],
    [],  # a delta of zeros
    [(3, 7), (1, 6), (4, 4)],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tenants",
    [[0], [1, -1, 0, 2, 1], [number % 5 - 1 for number in range(41)], [3] * 40, [-1, 2]],
    ids=["one", "mixed", "more rows than a program takes", "all one's", "none"],
)
@pytest.mark.usefixtures("poisoned")
def test_each_row_gets_its_own_delta(
    tenants: list[int], dtype: torch.dtype, device: torch.device, both: Both
) -> None:
    deltas = [random_delta(groups, SHAPE, 16, device) for groups in TENANTS]
    x = torch.randn(len(tenants), SHAPE[1], device=device).to(dtype)
    y = torch.randn(len(tenants), SHAPE[0], device=device).to(dtype)
    before = y.clone()
    rows = PackedDeltas(deltas, 16), RowOwners(tenants)
    found, expected = both(lambda: delta_matmul(x, y, *rows))
    check_close(found, expected, dtype, roundings=3)  # of vectors, of what lies between, of sums
    untouched = [row for row, tenant in enumerate(tenants) if tenant in (-1, 2)]
    torch.testing.assert_close(found[untouched], y[untouched], rtol=0, atol=0)
    torch.testing.assert_close(y, before, rtol=0, atol=0)


EVERY_WIDTH = [(3, 8), (2, 7), (1, 6), (20, 5), (2, 4), (18, 3), (33, 2), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 96), pytest.param((576, 2112), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    "tenants", [[0, -1, 2, 1], [1, 0, 1, -1, 0, 1] + 15 * [1]], ids=["one row each", "several"]
)
@pytest.mark.usefixtures("poisoned")
def test_vectors_of_whole_runs(
    tenants: list[int],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    both: Both,
) -> None:
    groups = [EVERY_WIDTH, [(17, 2), (5, 3)], [(2, 1)]]
    deltas = [random_delta(each, shape, 32, device) for each in groups]
    x = torch.randn(len(tenants), shape[1], device=device).to(dtype)
    y = torch.randn(len(tenants), shape[0], device=device).to(dtype)
    rows = PackedDeltas(deltas, 32), RowOwners(tenants)
    found, expected = both(lambda: delta_matmul(x, y, *rows))
    check_close(found, expected, dtype, roundings=3)


def test_codes_that_no_word_begins_with(device: torch.device, both: Both) -> None:
    [group] = random_delta([(3, 2)], (64, 96), 32, device)
    codes = torch.empty(len(group.left.codes) + 1, dtype=torch.uint8, device=device)[1:]
    codes.copy_(group.left.codes)
    moved = group._replace(left=group.left._replace(codes=codes))
    x, y = torch.randn(2, 96, device=device), torch.randn(2, 64, device=device)
    rows = PackedDeltas([[moved]], 32), RowOwners([0, -1])
    found, expected = both(lambda: delta_matmul(x, y, *rows))
    check_close(found, expected, x.dtype, roundings=3)


def test_rows_do_not_see_other_rows(device: torch.device) -> None:
    deltas = [random_delta(groups, SHAPE, 16, device) for groups in TENANTS]
    x, y = torch.randn(6, SHAPE[1], device=device), torch.randn(6, SHAPE[0], device=device)
    with use_backend("triton"):
        together = delta_matmul(x, y, PackedDeltas(deltas, 16), RowOwners([0, 3, 1, 0, -1, 3]))
        for row, tenant in enumerate([0, 3, 1, 0, -1, 3]):
            alone = delta_matmul(
                x[row : row + 1], y[row : row + 1], PackedDeltas(deltas, 16), RowOwners([tenant])
            )
            torch.testing.assert_close(together[row : row + 1], alone)


def test_what_does_not_fit_is_named() -> None:
    deltas = [random_delta([(1, 2)], SHAPE, 16, torch.device("cpu"))]
    x, y, packed = torch.zeros(3, 70), torch.zeros(3, 50), PackedDeltas(deltas, 16)
    with pytest.raises(ValueError, match=r"tenants: \[1\]"):
        delta_matmul(x, y, packed, RowOwners([0, 1, -1]))
    with pytest.raises(ValueError, match=r"rows: 2 .*3"):
        delta_matmul(x, y, packed, RowOwners([0, 0]))
