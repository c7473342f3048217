"""Kernels run on a GPU where there is one, else in Triton's interpreter."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmpress.nn.kernels.dispatch import use_backend

Both = Callable[[Callable[[], Any]], tuple[Any, Any]]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here, not interpreted")
    return torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with NaN: what a kernel does not write is seen."""
    plain = Tensor.new_empty

    def poison(self: Tensor, *size: Any, **settings: Any) -> Tensor:
        fresh = plain(self, *size, **settings)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else -1)

    monkeypatch.setattr(Tensor, "new_empty", poison)
    return


@pytest.fixture
def both() -> Both:
    """Call an operation as the kernel and as its reference."""

    def call(operation: Callable[[], Any]) -> tuple[Any, Any]:
        with use_backend("reference"):
            expected = operation()
        with use_backend("triton"):
            return operation(), expected

    return call
