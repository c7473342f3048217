"""Products on a CPU by weights in the order that oneDNN multiplies in.

`functional.linear` brings a weight into that order anew for every call, which for a few rows takes
about as long as the product.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional


def in_blocks(weights: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return weights ``[out, in]`` in oneDNN's order, and contiguous what it has no order for.

    `linear` takes them, and nothing else does: they have no strides, and no gradients.
    """
    return tuple(
        torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        if weight.dim() == 2 and weight.numel() and _has_blocks(weight.dtype)
        else weight.contiguous()
        for weight in weights
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x Wᵀ``, ``[..., out]``, for ``x [..., in]``.

    Args:
        x: Any dtype; where the weight is in blocks, in that of the weight afterwards.
        weight: ``[out, in]``, plain or from `in_blocks`.
    """
    if not weight.is_mkldnn:
        return functional.linear(x, weight)
    if x.dtype != weight.dtype:
        x = x.to(weight.dtype)
    product: Tensor = _product()(x, weight, None, "none", [], "")
    return product


@contextmanager
def multiplying_in_blocks(model: nn.Module) -> Iterator[None]:
    """Let the dense linears of a model on a CPU multiply by weights in blocks, without gradients.

    For as long as that lasts the weights are there twice, and must not change.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear and m.weight.is_cpu]
    for module, weight in zip(linears, in_blocks(m.weight.detach() for m in linears), strict=True):
        module.forward = partial(_affine, weight=weight, bias=module.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in linears:
            del module.forward


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = linear(x, weight)
    return product if bias is None else product + bias


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of two matrices, without gradients.

    In fp32 on a CPU by oneDNN: MKL, which torch takes for such, is half as fast on processors of
    other makers than its own.
    """
    if left.is_cpu and left.dtype == torch.float32 and _has_blocks(torch.float32):
        product: Tensor = _product()(left, right.t(), None, "none", [], "")
        return product
    return left @ right


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, with what blocks at its ends are filled up with."""
    if tensor.is_mkldnn:
        return int(torch.ops.mkldnn._nbytes(tensor))
    return tensor.nbytes


@cache
def _product() -> Callable[..., Tensor]:
    """Return torch's operation, looked up when needed: a build without oneDNN has none."""
    operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return operation


@cache
def _has_blocks(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
