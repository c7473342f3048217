"""Reading packed integers inside a kernel; `llmpress.packing` writes them."""

import triton
import triton.language as tl


@triton.jit
def load_codes(codes_ptr, index, mask, NUM_BITS: tl.constexpr):
    """Read the values at ``index``, each ``NUM_BITS`` (1 to 16) bits of a little-endian stream.

    Bytes beyond a value's last one are not touched, so the end of the buffer needs no padding.
    """
    bit = index * NUM_BITS
    byte_ptr = codes_ptr + (bit >> 3)
    shift = (bit & 7).to(tl.int32)
    value = tl.load(byte_ptr, mask=mask, other=0).to(tl.int32)
    if 8 % NUM_BITS != 0:
        second = tl.load(byte_ptr + 1, mask=mask & (shift + NUM_BITS > 8), other=0)
        value |= second.to(tl.int32) << 8
    if NUM_BITS > 9:
        third = tl.load(byte_ptr + 2, mask=mask & (shift + NUM_BITS > 16), other=0)
        value |= third.to(tl.int32) << 16
    return (value >> shift) & ((1 << NUM_BITS) - 1)


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
