"""n-bit unsigned integers to bytes and back, without a wasted bit between values.

Value ``i`` occupies bits ``[i * n, (i + 1) * n)`` of a little-endian bit stream; only the last byte
is padded. Eight values always fill exactly ``n`` bytes, so both directions are eight vectorised
shifts whatever the width.
"""

import torch
from torch import Tensor

MAX_BITS = 16


def code_width(num_values: int) -> int:
    """Bits that tell ``num_values`` values apart: ``max(1, ceil(log2 n))``."""
    return max(1, (num_values - 1).bit_length())


def packed_size(count: int, num_bits: int) -> int:
    """Bytes that ``count`` values of ``num_bits`` bits take."""
    return (count * num_bits + 7) // 8


def pack(values: Tensor, num_bits: int) -> Tensor:
    """Pack integers into a byte string.

    Args:
        values: Integers in ``[0, 2**num_bits)``, any shape; read in row-major order.
        num_bits: Width of one value, 1 to 16.

    Returns:
        uint8 tensor ``[packed_size(values.numel(), num_bits)]``.

    Raises:
        ValueError: A width outside 1-16, or a value that does not fit.
    """
    _check_width(num_bits)
    flat = values.reshape(-1).to(torch.int32)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << num_bits):
        raise ValueError(
            f"values in [{int(flat.min())}, {int(flat.max())}] do not fit {num_bits} bits"
        )
    count = flat.numel()
    octets = torch.nn.functional.pad(flat, (0, -count % 8)).view(-1, 8)  # [G, 8]
    packed = torch.zeros(octets.shape[0], num_bits + 2, dtype=torch.int32, device=flat.device)
    for lane in range(8):
        byte, shift = divmod(lane * num_bits, 8)
        shifted = octets[:, lane] << shift
        for extra in range(3):
            packed[:, byte + extra] |= (shifted >> (8 * extra)) & 0xFF
    return (
        packed[:, :num_bits]
        .reshape(-1)
        .to(torch.uint8)[: packed_size(count, num_bits)]
        .contiguous()
    )


def unpack(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Read integers back from a byte string written by `pack`.

    Args:
        packed: uint8 ``[packed_size(count, num_bits)]``.
        num_bits: Width of one value, 1 to 16.
        count: Number of values.

    Returns:
        int32 tensor ``[count]``.

    Raises:
        ValueError: A width outside 1-16, or a byte string of another length.
    """
    _check_width(num_bits)
    if packed.numel() != packed_size(count, num_bits):
        raise ValueError(
            f"{count} values of {num_bits} bits take {packed_size(count, num_bits)} bytes, "
            f"not {packed.numel()}"
        )
    groups = (count + 7) // 8
    data = torch.nn.functional.pad(packed, (0, groups * num_bits - packed.numel()))
    data = torch.nn.functional.pad(data.view(groups, num_bits), (0, 2)).to(torch.int32)  # [G, n+2]
    values = torch.empty(groups, 8, dtype=torch.int32, device=packed.device)
    mask = (1 << num_bits) - 1
    for lane in range(8):
        byte, shift = divmod(lane * num_bits, 8)
        window = data[:, byte] | data[:, byte + 1] << 8 | data[:, byte + 2] << 16
        values[:, lane] = (window >> shift) & mask
    return values.reshape(-1)[:count]


def _check_width(num_bits: int) -> None:
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"num_bits={num_bits}: allowed are 1 to {MAX_BITS}")
