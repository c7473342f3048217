"""Uniform grids for groups of weights: where they lie, and the nearest point on them.

A group is ``group_size`` consecutive columns of one row, ``G = ceil(columns / group_size)`` groups
a row. Its grid is ``scale · (code - zero_point)`` with ``code`` and ``zero_point`` in
``[0, 2**num_bits)``: zero always lies on it. Scales are rounded to fp16 before they are used, so
that what is computed here is what is stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SHRINK_STEPS = 16
SMALLEST_SHRINK = 0.4
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number


class Grid(NamedTuple):
    """Grids of all groups of a matrix.

    Attributes:
        scales: fp16 ``[rows, G]``, not negative; zero where a group holds only zeros.
        zero_points: int32 ``[rows, G]``.
    """

    scales: Tensor
    zero_points: Tensor


def fit_grid(
    weight: Tensor,
    num_bits: int,
    group_size: int,
    *,
    search: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """Choose the grid of every group.

    The grid spans the smallest to the largest weight of its group, zero included. With ``search``,
    ranges shrunk in steps down to two fifths are tried too, and the one with the smallest squared
    rounding error is kept: clipping a lone large weight buys the others a finer grid.

    Args:
        weight: fp32 ``[rows, columns]``, finite.
        num_bits: Bits of a code, 1 to 8.
        group_size: Columns of a group; the last group is shorter where it does not divide.
        search: Whether to search the range.
        importance: Weight of a column's squared error in the search, ``[columns]``, not negative.

    Returns:
        The grids.

    Raises:
        ValueError: Weights too large for fp16.
    """
    groups = _grouped(weight, group_size)  # [rows, G, group]
    low = groups.amin(dim=-1).clamp(max=0)
    high = groups.amax(dim=-1).clamp(min=0)
    best = _span(low, high, num_bits)
    if not search:
        return best
    columns = torch.ones_like(weight[:1]) if importance is None else importance[None].float()
    column_weights = _grouped(columns, group_size)  # [1, G, group]
    best_error = _rounding_error(groups, best, num_bits, column_weights)
    for step in range(1, SHRINK_STEPS):
        shrink = 1 - (1 - SMALLEST_SHRINK) * step / (SHRINK_STEPS - 1)
        grid = _span(low * shrink, high * shrink, num_bits)
        error = _rounding_error(groups, grid, num_bits, column_weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def fitting_bytes(search: bool) -> float:
    """Return the bytes moved per weight by `fit_grid`, with or without the search: measured."""
    return 700.0 if search else 100.0


def nearest_codes(weight: Tensor, grid: Grid, num_bits: int, group_size: int) -> Tensor:
    """Return the code of the nearest grid point for each weight, int32 ``[rows, columns]``."""
    rows, columns = weight.shape
    codes = _rounded(_grouped(weight, group_size), grid, num_bits) + grid.zero_points.unsqueeze(-1)
    return codes.view(rows, -1)[:, :columns].to(torch.int32)


def _span(low: Tensor, high: Tensor, num_bits: int) -> Grid:
    """Return the grid whose first code is ``low <= 0`` and whose last is ``high >= 0``."""
    levels = (1 << num_bits) - 1
    spread = high - low
    scales = torch.where(spread > 0, (spread / levels).clamp(min=SMALLEST_SCALE), 0.0)
    scales = scales.to(torch.float16)
    if bool((scales.float() * levels > torch.finfo(torch.float16).max).any()):
        raise ValueError(
            f"weight: a range of {float(spread.max()):.3g} is too large for fp16 scales"
        )
    zero_points = (-low * _reciprocal(scales)).round().clamp(0, levels).to(torch.int32)
    return Grid(scales, zero_points)


def _rounded(groups: Tensor, grid: Grid, num_bits: int) -> Tensor:
    """Return ``code - zero_point`` of the nearest grid points of ``groups [rows, G, group]``."""
    zeros = grid.zero_points.unsqueeze(-1).float()
    steps = (groups * _reciprocal(grid.scales).unsqueeze(-1)).round_()
    return steps.clamp_(min=-zeros).clamp_(max=(1 << num_bits) - 1 - zeros)


def _rounding_error(groups: Tensor, grid: Grid, num_bits: int, column_weights: Tensor) -> Tensor:
    """Return the weighted squared rounding error of each group, ``[rows, G]``."""
    error = _rounded(groups, grid, num_bits).mul_(grid.scales.float().unsqueeze(-1)).sub_(groups)
    return error.square_().mul_(column_weights).sum(dim=-1)


def _reciprocal(scales: Tensor) -> Tensor:
    """Return ``1 / scale`` in fp32, and 0 where the scale is 0."""
    scales = scales.float()
    return torch.where(scales > 0, 1 / scales, 0.0)


def _grouped(matrix: Tensor, group_size: int) -> Tensor:
    """View ``[rows, columns]`` as ``[rows, G, group]``, zeros filling the last group."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % group_size))
    return padded.view(matrix.shape[0], -1, group_size)
