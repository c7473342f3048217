"""``y = (x Bᵀ) Aᵀ`` for few rows: both factors in one launch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.kernels.dispatch import uses_triton
from llmpress.kernels.low_rank_matmul.reference import low_rank_matmul_reference

MOST_ROWS = 64
"""Above, two plain matrix products are faster by any estimate."""


@torch.library.custom_op("llmpress::low_rank_matmul", mutates_args=())
def low_rank_matmul(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Multiply by the product of two factors, which is not formed.

    Args:
        x: ``[M, in]``, fp16, bf16 or fp32; rows contiguous.
        A: ``[out, rank]``, any float dtype, contiguous.
        B: ``[rank, in]``, the same.

    Returns:
        ``(x Bᵀ) Aᵀ``, ``[M, out]`` in the dtype of ``x``; sums are fp32, also ``x Bᵀ`` for up to
        `MOST_ROWS` rows on a GPU.
    """
    if not uses_triton(x):
        return low_rank_matmul_reference(x, A, B)
    if x.shape[0] > MOST_ROWS:
        return functional.linear(functional.linear(x, B.to(x.dtype)), A.to(x.dtype))
    from llmpress.kernels.low_rank_matmul.triton import low_rank_matmul_triton

    return low_rank_matmul_triton(x, A, B)


@low_rank_matmul.register_fake
def _(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B = ctx.saved_tensors
    needs_x, needs_A, needs_B = ctx.needs_input_grad
    through = gradient @ A.to(gradient.dtype)  # [M, rank]
    to_x = through @ B.to(gradient.dtype) if needs_x else None
    to_B = (through.t() @ x).to(B.dtype) if needs_B else None
    to_A = (gradient.t() @ (x @ B.to(x.dtype).t())).to(A.dtype) if needs_A else None
    return to_x, to_A, to_B


low_rank_matmul.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["low_rank_matmul"]
