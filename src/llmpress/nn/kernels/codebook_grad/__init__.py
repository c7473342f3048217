"""The gradient of a codebook from a layer's inputs and the gradient of its outputs."""

import torch
from torch import Tensor

from llmpress.nn.kernels.codebook_grad.reference import codebook_grad_reference
from llmpress.nn.kernels.dispatch import uses_triton


@torch.library.custom_op("llmpress::codebook_grad", mutates_args=())
def codebook_grad(
    x: Tensor, gradient: Tensor, codes: Tensor, num_entries: int, vector_size: int
) -> Tensor:
    """Add up the gradients of all vectors that use an entry.

    Args:
        x: Inputs ``[M, in]``.
        gradient: Of the outputs, ``[M, out]``, in the dtype of ``x``.
        codes: Packed, uint8, of ``in · ceil(out / d)`` vectors in the order of ``Wᵀ``.
        num_entries: ``K``.
        vector_size: ``d``.

    Returns:
        fp32 ``[K, d]``. On a GPU the last bits differ between runs: entries are added up by
        atomic operations, in no fixed order.
    """
    if uses_triton(x):
        from llmpress.nn.kernels.codebook_grad.triton import codebook_grad_triton

        return codebook_grad_triton(x, gradient, codes, num_entries, vector_size)
    return codebook_grad_reference(x, gradient, codes, num_entries, vector_size)


@codebook_grad.register_fake
def _(x: Tensor, gradient: Tensor, codes: Tensor, num_entries: int, vector_size: int) -> Tensor:
    return x.new_empty(num_entries, vector_size, dtype=torch.float32)


__all__ = ["codebook_grad"]
