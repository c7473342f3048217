"""Products with compressed weights on a CPU, from the tensors as they are stored.

`products.cpp` is compiled when llmpress is installed, if a compiler is there. It is a plain C
library: nothing of torch is needed to build it, and it runs on torch's own threads. Without it
`library` gives None, and layers unpack their weights with torch.

Sums are fp32, weights exact, inputs and outputs of any float dtype. An output does not depend on
the number of threads, nor on how many rows are multiplied together.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmpress.core.errors import ConfigError

VARIABLE = "LLMPRESS_CPU"
"""Environment variable: ``off``, or the instruction set to use at most."""
LEVELS = ("plain", "avx2", "avx512")
"""Instruction sets: what every processor of an architecture has, AVX2, AVX-512."""

_VERSION = 1
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
DTYPES = frozenset(DTYPE_NUMBERS) - {torch.int8}
"""Of inputs and outputs."""
MOST_ROWS = 16
"""Inputs with more rows are multiplied by the weight written out."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "packed": [*[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 3, *[_INT] * 4, ctypes.c_float],
    "write_packed": [_POINTER, _INT, *[_POINTER] * 3, *[_INT] * 4, ctypes.c_float],
    "dense": [*[_POINTER] * 2, *[_INT] * 2, _POINTER, *[_INT] * 3],
    "low_rank": [*[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 2, *[_INT] * 4],
    "codebook": [*[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 3, *[_INT] * 6],
    "write_codebook": [_POINTER, _INT, *[_POINTER] * 3, *[_INT] * 6],
    "delta": [*[_POINTER] * 3, *[_INT] * 2, *[_POINTER] * 2, _INT, _POINTER],
}


class Library(NamedTuple):
    """The compiled products, by name, and the instruction set that they use."""

    packed: Any
    write_packed: Any
    dense: Any
    low_rank: Any
    codebook: Any
    write_codebook: Any
    delta: Any
    start: Any
    level: str


@cache
def library() -> Library | None:
    """Return the compiled products; None where there are none."""
    found = loaded()
    return None if isinstance(found, str) else found


@cache
def loaded() -> Library | str:
    """Return the compiled products, or the reason why there are none.

    Raises:
        ConfigError: The environment asks for an instruction set that is unknown.
    """
    wanted = os.environ.get(VARIABLE, LEVELS[-1])
    if wanted == "off":
        return f"{VARIABLE}=off"
    if wanted not in LEVELS:
        raise ConfigError(f"{VARIABLE}={wanted}: allowed are off, {', '.join(LEVELS)}")
    found = importlib.util.find_spec(f"{__name__}._products")
    if found is None or found.origin is None:
        return "llmpress was installed where no C++ compiler was: install one, then llmpress again"
    try:
        made = ctypes.CDLL(found.origin)
        threads = ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, _POINTER)
    except (OSError, AttributeError) as error:
        return f"{found.origin} cannot be used: {' '.join(str(error).split())}"
    if made.llmpress_version() != _VERSION:
        return f"{found.origin} is of another version: install llmpress again"
    made.llmpress_start.argtypes = [_POINTER, ctypes.c_int]
    start = partial(made.llmpress_start, threads)
    level = LEVELS[start(LEVELS.index(wanted))]
    functions = {name: getattr(made, f"llmpress_{name}") for name in _ARGUMENTS}
    for name, arguments in _ARGUMENTS.items():
        functions[name].argtypes, functions[name].restype = arguments, None
    return Library(**functions, start=start, level=level)


@contextmanager
def use_level(name: str) -> Iterator[str]:
    """Use at most this instruction set until the context ends, which gets the one in use."""
    made = needed_library()
    try:
        yield LEVELS[made.start(LEVELS.index(name))]
    finally:
        made.start(LEVELS.index(made.level))


def description() -> str:
    """Return in a clause how products with compressed weights are computed on this CPU."""
    found = loaded()
    if isinstance(found, str):
        return f"unpacked with torch for each call, slow ({found})"
    return f"from packed weights, {found.level}"


def packed_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int, group_size: int
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]``; arguments are those of `quantized_matmul`."""
    rows, columns = x.shape
    y = x.new_empty(rows, scales.shape[0])
    needed_library().packed(
        y.data_ptr(), x.data_ptr(), DTYPE_NUMBERS[x.dtype], rows, codes.data_ptr(),
        scales.data_ptr(), zero_points.data_ptr(), scales.shape[0], columns, num_bits,
        group_size, 0.0,
    )  # fmt: skip
    return y


def packed_weight(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``W``, ``[out, in]`` in ``dtype``; the other arguments are those of the product."""
    weight = scales.new_empty(scales.shape[0], in_features, dtype=dtype)
    needed_library().write_packed(
        weight.data_ptr(), DTYPE_NUMBERS[dtype], codes.data_ptr(), scales.data_ptr(),
        zero_points.data_ptr(), *weight.shape, num_bits, group_size, 0.0,
    )  # fmt: skip
    return weight


def sign_matmul(x: Tensor, signs: Tensor, scale: float, out_features: int) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]``, for ``scale`` times the packed ``signs`` of ``[out, in]``."""
    rows, columns = x.shape
    y = x.new_empty(rows, out_features)
    needed_library().packed(
        y.data_ptr(), x.data_ptr(), DTYPE_NUMBERS[x.dtype], rows, signs.data_ptr(), None, None,
        out_features, columns, 1, columns, scale,
    )  # fmt: skip
    return y


def sign_weight(
    signs: Tensor, scale: float, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return ``W``, ``[out, in]`` in ``dtype``."""
    weight = signs.new_empty(out_features, in_features, dtype=dtype)
    needed_library().write_packed(
        weight.data_ptr(), DTYPE_NUMBERS[dtype], signs.data_ptr(), None, None, *weight.shape, 1,
        in_features, scale,
    )  # fmt: skip
    return weight


def dense_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]``, for ``weight [out, in]`` in any float dtype, contiguous."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    needed_library().dense(
        y.data_ptr(), x.data_ptr(), DTYPE_NUMBERS[x.dtype], x.shape[0], weight.data_ptr(),
        *weight.shape, DTYPE_NUMBERS[weight.dtype],
    )  # fmt: skip
    return y


def low_rank_matmul(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ``(x Bᵀ) Aᵀ``, ``[M, out]``, for ``A [out, rank]`` and ``B [rank, in]``."""
    y = x.new_empty(x.shape[0], A.shape[0])
    needed_library().low_rank(
        y.data_ptr(), x.data_ptr(), DTYPE_NUMBERS[x.dtype], x.shape[0], A.data_ptr(), B.data_ptr(),
        *A.shape, B.shape[1], DTYPE_NUMBERS[A.dtype],
    )  # fmt: skip
    return y


def codebook_matmul(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int, bits: int
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]``; arguments are those of the operation, and a code's bits."""
    rows, columns = x.shape
    y = x.new_empty(rows, out_features)
    needed_library().codebook(
        y.data_ptr(), x.data_ptr(), DTYPE_NUMBERS[x.dtype], rows, codes.data_ptr(),
        codebook.data_ptr(), None if scales is None else scales.data_ptr(), columns,
        out_features, bits, *codebook.shape, DTYPE_NUMBERS[codebook.dtype],
    )  # fmt: skip
    return y


def transposed_codebook_weight(
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``Wᵀ``, ``[in, out]`` in ``dtype``."""
    weight = codebook.new_empty(in_features, out_features, dtype=dtype)
    needed_library().write_codebook(
        weight.data_ptr(), DTYPE_NUMBERS[dtype], codes.data_ptr(), codebook.data_ptr(),
        None if scales is None else scales.data_ptr(), in_features, out_features, bits,
        *codebook.shape, DTYPE_NUMBERS[codebook.dtype],
    )  # fmt: skip
    return weight


def needed_library() -> Library:
    """Return the compiled products where `library` has said that there are some."""
    found = library()
    if found is None:
        raise RuntimeError("there is no compiled library: ask `library` first")
    return found
