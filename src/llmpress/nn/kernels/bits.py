"""Reading packed integers inside a kernel; `llmpress.nn.packing` writes them."""

import triton
import triton.language as tl
from torch import Tensor


def aligned(codes: Tensor, num_bytes: int) -> Tensor:
    """Return packed codes that words of ``num_bytes`` can be read from: mostly the same tensor."""
    return codes.clone() if codes.data_ptr() % num_bytes else codes


@triton.jit
def load_codes(codes_ptr, index, mask, NUM_BITS: tl.constexpr):
    """Read the values at ``index``, each ``NUM_BITS`` (1 to 16) bits of a little-endian stream.

    Bytes beyond a value's last one are not touched, so the end of the buffer needs no padding.
    """
    if NUM_BITS == 16:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.uint16))
        value = tl.load(words_ptr + index, mask=mask, other=0).to(tl.int32)
    elif NUM_BITS == 8:
        value = tl.load(codes_ptr + index, mask=mask, other=0).to(tl.int32)
    else:
        bit = index * NUM_BITS
        byte_ptr = codes_ptr + (bit >> 3)
        shift = (bit & 7).to(tl.int32)
        value = tl.load(byte_ptr, mask=mask, other=0).to(tl.int32)
        if 8 % NUM_BITS != 0:
            second = tl.load(byte_ptr + 1, mask=mask & (shift + NUM_BITS > 8), other=0)
            value |= second.to(tl.int32) << 8
        if NUM_BITS > 10 and NUM_BITS != 12:  # of 10 and 12 bits none lies in three bytes
            third = tl.load(byte_ptr + 2, mask=mask & (shift + NUM_BITS > 16), other=0)
            value |= third.to(tl.int32) << 16
        value = (value >> shift) & ((1 << NUM_BITS) - 1)
    return value


@triton.jit
def load_codes_of_width(codes_ptr, index, mask, num_bits):
    """Read values of 1 to 8 bits whose width is known at run time only."""
    bit = index * num_bits
    byte_ptr = codes_ptr + (bit >> 3)
    shift = (bit & 7).to(tl.int32)
    value = tl.load(byte_ptr, mask=mask, other=0).to(tl.int32)
    second = tl.load(byte_ptr + 1, mask=mask & (shift + num_bits > 8), other=0)
    value |= second.to(tl.int32) << 8
    return (value >> shift) & ((1 << num_bits) - 1)
