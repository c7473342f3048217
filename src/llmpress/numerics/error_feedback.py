"""Rounding with error feedback: what GPTQ does, on its own or inside another method.

Dimensions: ``W [rows, n]``, ``H = E[x xᵀ] [n, n]``.
"""

import torch
from torch import Tensor

BLOCK_COLUMNS = 128


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
    codes = torch.empty(columns.shape, dtype=torch.int32, device=columns.device)
    for start in range(0, count, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, count)
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            code = (columns[i] * inverse_scales[i]).add_(zero_points[i]).round_()
            codes[i] = code.clamp_(0, largest_code)
            error = columns[i].sub(code.sub_(zero_points[i]).mul_(scales[i])).div_(pivots[i])
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
