"""Random packed weights, and how far a kernel may be from its reference."""

import torch
from torch import Tensor

from llmpress.nn.kernels.delta_matmul import PackedVectors, TripletGroup
from llmpress.nn.packing import code_width, pack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest output: operands are rounded once to this dtype, sums are fp32."""


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Compare with a tolerance that follows from the dtype of the operands."""
    assert found.dtype == expected.dtype
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=0, atol=roundings * ROUNDING[dtype] * scale
    )


def random_codes(num_entries: int, count: int, device: torch.device) -> Tensor:
    """Return packed codes, the largest one among them."""
    codes = torch.randint(0, num_entries, (count,))
    codes[-1] = num_entries - 1
    return pack(codes, code_width(num_entries)).to(device)


def random_codebook(
    num_entries: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``[K, d]``; integers for int8."""
    values = torch.randn(num_entries, size, device=device)
    return (30 * values).clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def random_vectors(
    count: int, length: int, num_bits: int, group_size: int, device: torch.device
) -> PackedVectors:
    """Return quantized rows around zero: ``count`` of ``length`` entries."""
    shape = (count, -(-length // group_size))
    return PackedVectors(
        pack(torch.randint(0, 1 << num_bits, (count, length)), num_bits).to(device),
        (torch.rand(shape) + 0.1).half().to(device),
        pack(torch.randint(0, 1 << num_bits, shape), num_bits).to(device),
    )


def random_delta(
    groups: list[tuple[int, int]], shape: tuple[int, int], group_size: int, device: torch.device
) -> list[TripletGroup]:
    """Return groups of (rank, bits) for a matrix of ``shape`` (out, in)."""
    return [
        TripletGroup(
            bits,
            random_vectors(rank, shape[1], bits, group_size, device),
            random_vectors(rank, shape[0], bits, group_size, device),
            torch.rand(rank, device=device) * 4.0**-bits,
        )
        for rank, bits in groups
    ]
