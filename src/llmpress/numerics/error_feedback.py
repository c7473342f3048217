"""Rounding with error feedback: what GPTQ does, on its own or inside another method.

Dimensions: ``W [rows, n]``, ``H = E[x xᵀ] [n, n]``.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_COLUMNS = 128


@np.errstate(all="ignore")  # as torch does
def feed_errors_back(
    columns: Tensor, factor: Tensor, scales: Tensor, zero_points: Tensor, num_bits: int
) -> Tensor:
    """Round column after column; ``columns [n, rows]`` (overwritten) has a column per row.

    Args:
        columns: ``Wᵀ [n, rows]`` in the order of rounding.
        factor: Upper ``C [n, n]`` with ``Cᵀ C = H⁻¹``.
        scales: Grid of each weight, ``[n, rows]``.
        zero_points: The same.
        num_bits: Bits of one code.

    Returns:
        int32 codes ``[n, rows]``.
    """
    count = columns.shape[0]
    largest_code = (1 << num_bits) - 1
    inverse_scales = torch.where(scales > 0, 1 / scales, 0.0)
    pivots = factor.diagonal().tolist()
    rounded = torch.empty_like(columns)
    errors = torch.empty_like(columns[:BLOCK_COLUMNS])
    on_host = columns.device.type == "cpu"
    lib: Any = np if on_host else torch  # NumPy takes half the time to begin an operation
    for start in range(0, count, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, count)
        block = [t[start:stop] for t in (columns, inverse_scales, scales, zero_points, rounded)]
        block.append(errors[: stop - start])
        rows = zip(*((t.numpy() if on_host else t) for t in block), strict=True)
        for i, (column, inverse_scale, scale, zero_point, code, error) in enumerate(rows, start):
            lib.multiply(column, inverse_scale, out=code)
            code += zero_point
            (np.rint if on_host else torch.round)(code, out=code)
            lib.clip(code, 0, largest_code, out=code)
            lib.subtract(code, zero_point, out=error)
            error *= scale
            lib.subtract(column, error, out=error)
            error /= pivots[i]
            rest = columns[i + 1 : stop]
            rest.addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return rounded.int()
