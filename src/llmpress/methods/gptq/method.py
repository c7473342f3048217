"""GPTQ: column-by-column quantization that pushes each column's error into the ones to come.

Dimensions: ``weight [rows, columns]``, ``H = E[x xᵀ] [columns, columns]``, ``G`` groups a row.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llmpress.methods.base import (
    InputStatistics,
    Method,
    Shape,
    Work,
    checked_statistics,
    checked_weight,
)
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.numerics.error_feedback import feed_errors_back
from llmpress.numerics.grids import fit_grid, fitting_bytes
from llmpress.numerics.linalg import damped_inverse_cholesky, with_positive_diagonal

logger = logging.getLogger(__name__)


class Quantized(NamedTuple):
    """A quantized matrix, ready for `QuantizedLinear.from_codes`.

    Attributes:
        codes: int32 ``[rows, columns]`` in ``[0, 2**num_bits)``.
        scales: fp16 ``[rows, G]``.
        zero_points: int32 ``[rows, G]``.
        dampening: What was added to the diagonal of ``H``, as a fraction of its mean.
        attempts: Factorizations tried; more than 1 where the dampening had to be raised.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    dampening: float
    attempts: int


class Rounded(NamedTuple):
    """Codes of a matrix whose grids were given; otherwise as in `Quantized`."""

    codes: Tensor
    dampening: float
    attempts: int


@dataclass(frozen=True)
class GPTQ(Method):
    """Hessian-based error feedback with activation order.

    Attributes:
        num_bits: Bits of one code, 1 to 8.
        group_size: Consecutive input channels that share a scale and a zero point; cut to the
            number of input channels where it is larger.
        dampening: Added to the diagonal of the second moment, as a fraction of its mean.
        act_order: Whether channels with large inputs are quantized first.
        search_range: Whether each group's range is the one with the least squared rounding error
            instead of the smallest to the largest weight.
    """

    uses_statistics: ClassVar[bool] = True
    requires_statistics: ClassVar[bool] = True

    num_bits: int = 4
    group_size: int = 128
    dampening: float = 0.01
    act_order: bool = True
    search_range: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_bits <= 8:
            raise ValueError(f"num_bits={self.num_bits}: allowed are 1 to 8")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: must be positive")
        if not 0 <= self.dampening < 1:
            raise ValueError(f"dampening={self.dampening}: allowed are 0 to below 1")

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> QuantizedLinear:
        """Quantize ``weight [out, in]``; the seed is not used.

        Raises:
            ValueError: A weight that is no finite float matrix or too large for fp16 scales;
                statistics missing or of another size.
        """
        del seed
        weight = checked_weight(weight)
        statistics = checked_statistics(statistics, weight)
        group_size = min(self.group_size, weight.shape[1])
        result = quantize_gptq(
            weight,
            statistics.second_moment,
            self.num_bits,
            group_size,
            dampening=self.dampening,
            act_order=self.act_order,
            search_range=self.search_range,
        )
        layer = QuantizedLinear.from_codes(
            result.codes, result.scales, result.zero_points, self.num_bits, group_size
        )
        if result.attempts > 1:
            layer.notes = {"dampening": result.dampening}
        return layer

    def empty_layer(self, shape: Shape) -> QuantizedLinear:
        """Return codes and grids of this shape."""
        return QuantizedLinear.empty(
            shape,
            num_bits=self.num_bits,
            group_size=min(self.group_size, shape.in_features),
        )

    def work(self, shape: Shape) -> Work:
        """Return the work of the factorization, of the grids, and of column after column."""
        n = shape.in_features
        return Work(
            fp32_flops=4.0 * n**3 + shape.num_weights * n,
            bytes_moved=(600.0 + fitting_bytes(self.search_range)) * shape.num_weights,
            calls=14.0 * n,
        )

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the matrix in several forms and of the second moment's."""
        return 4 * (9 * shape.num_weights + 5 * shape.in_features**2)


def quantize_gptq(
    weight: Tensor,
    second_moment: Tensor,
    num_bits: int,
    group_size: int,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
    search_range: bool = True,
) -> Quantized:
    """Quantize a matrix so that its product with typical inputs changes little.

    Minimises ``tr(E H Eᵀ)``, ``E = W - Ŵ``, greedily: a column is rounded, and the columns still
    to come absorb its error as well as they can. Columns that never saw an input have no error to
    pass on and are simply rounded.

    Args:
        weight: ``W [rows, columns]``, finite; not modified.
        second_moment: ``H [columns, columns]``, symmetric, positive semi-definite; not modified.
        num_bits: Bits of one code, 1 to 8.
        group_size: Consecutive columns that share a scale and a zero point.
        dampening: Added to the diagonal of ``H``, as a fraction of its mean; raised tenfold for as
            long as ``H`` cannot be factorized, which is logged and returned.
        act_order: Whether columns with a large ``E[x²]`` come first. The grids are fixed up front
            on the given order of columns, so no permutation has to be stored.
        search_range: See `llmpress.numerics.grids.fit_grid`.

    Returns:
        Codes and grids in the given order of columns, and the dampening used.

    Raises:
        ValueError: Weights too large for fp16 scales, or an ``H`` that is not positive.

    Source: arXiv 2210.17323, algorithm 1. Deviations: grids of all groups are fixed before the
    first column is rounded; their ranges are searched; columns without input keep their weights,
    which the authors' code sets to zero.
    """
    weight = weight.detach().float()
    moment = with_positive_diagonal(second_moment)
    grid = fit_grid(weight, num_bits, group_size, search=search_range, importance=moment.diagonal())
    group_of = torch.arange(weight.shape[1], device=weight.device) // group_size
    codes, used, attempts = round_with_feedback(
        weight,
        moment,
        grid.scales[:, group_of],
        grid.zero_points[:, group_of],
        num_bits,
        dampening=dampening,
        act_order=act_order,
    )
    return Quantized(codes, grid.scales, grid.zero_points, used, attempts)


def round_with_feedback(
    weight: Tensor,
    second_moment: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    num_bits: int,
    *,
    dampening: float = 0.01,
    act_order: bool = True,
) -> Rounded:
    """Round a matrix onto given grids, ``scale · (code - zero_point)``, with error feedback.

    Args:
        weight: ``W [rows, columns]``, finite; not modified.
        second_moment: ``H [columns, columns]``, symmetric, positive semi-definite; not modified.
        scales: Grid of each weight, ``[rows, columns]``, not negative.
        zero_points: The same; need not be whole.
        num_bits: Bits of one code, 1 to 8.
        dampening: See `quantize_gptq`.
        act_order: See `quantize_gptq`.

    Returns:
        Codes in the given order of columns, and the dampening used.

    Raises:
        ValueError: An ``H`` that is not positive.
    """
    moment = with_positive_diagonal(second_moment)
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = moment.diagonal().argsort(descending=True, stable=True)
    factor, used, attempts = damped_inverse_cholesky(moment[order][:, order], dampening)
    if attempts > 1:
        logger.warning("the second moment needed a dampening of %g instead of %g", used, dampening)
    in_rounding_order = feed_errors_back(
        weight.detach().float().T[order].contiguous(),
        factor,
        scales.float().T[order].contiguous(),
        zero_points.float().T[order].contiguous(),
        num_bits,
    )
    codes = torch.empty_like(in_rounding_order).index_copy_(0, order, in_rounding_order)
    return Rounded(codes.T.contiguous(), used, attempts)
