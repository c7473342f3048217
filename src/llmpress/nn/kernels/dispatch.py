"""Which implementation runs: Triton's on a GPU, the compiled one on a CPU, else plain torch."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from llmpress.nn.kernels.cpu import DTYPES, library

Backend = Literal["triton", "reference"]
P = ParamSpec("P")
R = TypeVar("R")

_forced: Backend | None = None


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every operation until the context ends: for tests.

    ``triton`` on the CPU needs Triton's interpreter: TRITON_INTERPRET=1 in the environment before
    the first kernel is imported.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def uses_triton(x: Tensor) -> bool:
    """Whether operations on ``x`` run in Triton."""
    if _forced is not None:
        return _forced == "triton"
    return x.is_cuda and has_triton()


def uses_compiled(x: Tensor) -> bool:
    """Whether products with ``x`` may come from the library that is compiled for this CPU.

    torch.compile cannot look into it, nor may it while it is loaded.
    """
    if torch.compiler.is_compiling():
        return False
    return _forced is None and x.is_cpu and x.dtype in DTYPES and library() is not None


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch for CUDA brings it."""
    return importlib.util.find_spec("triton") is not None


@cache
def num_processors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a GPU; 1 for a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def num_splits(programs: int, most: int, device: torch.device) -> int:
    """Return into how many parts a sum is split so that two programs per multiprocessor run.

    Args:
        programs: How many there are without a split.
        most: Parts that still have enough work each.
        device: Where they run.
    """
    return max(1, min(most, -(-2 * num_processors(device) // programs)))


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Start kernels on the GPU that holds the first argument: Triton takes the current one."""

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        first = cast("Tensor", args[0])
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launch(*args, **kwargs)

    return launched
