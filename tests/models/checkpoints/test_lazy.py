"""Tensors that are read in parts: the right values, and no more than is needed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from llmpress.models.checkpoints.lazy import Index, LazyTensor

OPERATIONS: dict[str, tuple[Callable[[Sequence[Tensor]], Tensor], int]] = {
    "slice": (lambda x: x[0][2:4, 1:], 8),
    "slice with a step": (lambda x: x[0][1:6:2], 25),
    "select": (lambda x: x[1][2], 5),
    "element": (lambda x: x[1][-1, 3], 1),
    "stack": (lambda x: torch.stack(list(x))[1, :3], 15),
    "stack in the last dimension": (lambda x: torch.stack(list(x), -1)[..., -1], 30),
    "cat": (lambda x: torch.cat(list(x))[4:14], 50),
    "cat of columns": (lambda x: torch.cat(list(x), 1)[:, 3:11], 48),
    "chunk": (lambda x: torch.chunk(torch.cat(list(x)), 4)[3], 15),
    "split": (lambda x: torch.split(torch.cat(list(x)), [5, 6, 7])[1].contiguous(), 30),
    "unbind": (lambda x: torch.unbind(torch.stack(list(x), 1), 1)[2], 30),
    "squeeze": (lambda x: torch.chunk(torch.stack(list(x)), 3)[2].squeeze(0), 30),
    "transpose": (lambda x: x[1].transpose(0, 1)[1:3], 12),
    "clone": (lambda x: x[2].detach().clone()[:2], 10),
    "another operation": (lambda x: x[0].reshape(3, 2, 5).transpose(0, 1).reshape(6, 5)[2:4], 30),
    "several results": (lambda x: torch.max(x[0], 1)[1], 30),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_read_is_the_operations_part(name: str) -> None:
    operation, numbers = OPERATIONS[name]
    given = [torch.randn(6, 5) for _ in range(3)]
    taken = []

    def lazy(tensor: Tensor) -> LazyTensor:
        def read(index: Index) -> Tensor:
            taken.append(tensor[index].numel())
            return tensor[index]

        return LazyTensor(tensor.shape, tensor.dtype, read)

    result, expected = operation([lazy(tensor) for tensor in given]), operation(given)
    assert not taken
    assert isinstance(result, LazyTensor)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(result.read(), expected, rtol=0, atol=0)
    assert sum(taken) == numbers
