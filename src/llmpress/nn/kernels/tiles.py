"""Sizes and types of tiles that kernels have in common."""

import torch
import triton
import triton.language as tl

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def padded_size(size: int) -> int:
    """Return the smallest power of two that is not below ``size``: a tile's side."""
    return int(triton.next_power_of_2(size))


def rows_of_tile(num_rows: int) -> int:
    """Return the rows of a tile: 1 for a single one, else the fewest that tensor cores take."""
    return 1 if num_rows == 1 else 16


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which operands enter a tensor core; fp32 where Triton is interpreted.

    The interpreter computes with numpy, which has no bfloat16.
    """
    return tl.float32 if triton.knobs.runtime.interpret else _TYPES[dtype]
