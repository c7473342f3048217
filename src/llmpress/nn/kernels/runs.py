"""Products with packed integers that are unpacked run by run.

A run is 32 codes: as many words of 32 bits as a code has bits. A step takes one code of each run of
a tile. The code may stay where it is in its half of a word and becomes the last digits of 2^23,
which makes it the float ``2^23 + place · code`` without a shift or a conversion; the place, a power
of two, is divided out of what the code is multiplied by.
"""

import triton
import triton.language as tl

from llmpress.nn.kernels.bits import load_codes

RUN = 32
"""Codes of a run."""


@triton.jit
def place_of(K: tl.constexpr, NUM_BITS: tl.constexpr, IN_PLACE: tl.constexpr):
    """Return by which power of two the K-th code of a run is too large as `next_code` takes it."""
    if K * NUM_BITS % 32 + NUM_BITS > 32 or not IN_PLACE:
        return 1
    return 1 << (K * NUM_BITS % 16)


@triton.jit
def next_code(
    run_ptr,
    mask,
    zeros,
    word,
    following,
    K: tl.constexpr,
    NUM_BITS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Take the K-th code of each run, for K = 0, 1, 2, ...

    Args:
        run_ptr: First words of the runs.
        mask: Which runs there are.
        zeros: Their zero points, fp32.
        word: What was returned for the code before; anything for the first one.
        following: The same.
        K: Which code.
        NUM_BITS: Of a code, 1 to 8.
        IN_PLACE: Not to shift it, for an instruction less; what is then done once for each place
            takes registers.

    Returns:
        ``word`` and ``following`` for the next code, and ``place · (code - zero)``, fp32.
    """
    if K * NUM_BITS % 32 == 0:
        word = tl.load(run_ptr + K * NUM_BITS // 32, mask=mask, other=0)
    elif K * NUM_BITS % 32 < NUM_BITS:  # the code before this one lay in both
        word = following
    if K * NUM_BITS % 32 + NUM_BITS > 32:
        following = tl.load(run_ptr + K * NUM_BITS // 32 + 1, mask=mask, other=0)
        code = (word >> (K * NUM_BITS % 32)) | (following << (32 - K * NUM_BITS % 32))
    elif not IN_PLACE:
        code = word >> (K * NUM_BITS % 32)
    elif K * NUM_BITS % 32 >= 16:
        code = word >> 16
    else:
        code = word
    place = place_of(K, NUM_BITS, IN_PLACE)
    digits = (code & (((1 << NUM_BITS) - 1) * place)) | 0x4B000000
    return word, following, digits.to(tl.float32, bitcast=True) - (zeros * place + 8388608.0)


@triton.jit
def product_with_runs(
    rows_ptr,
    mask_m,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    offs_o,
    mask_o,
    in_features,
    start,
    stop,
    GROUP_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Multiply rows by rows of runs: ``x[m, start:stop] · W[o, start:stop]ᵀ``.

    Args:
        rows_ptr: First inputs of the rows, ``[BLOCK_M]``.
        mask_m: Which rows there are.
        codes_ptr: Of all ``[out, in]`` codes; aligned to words.
        scales_ptr: Of ``[out, in / GROUP_SIZE]`` scales.
        zeros_ptr: Of as many zero points, packed.
        offs_o: Which rows of the weight.
        mask_o: Which of them there are.
        in_features: Of a row, a multiple of 32, like ``GROUP_SIZE``.
        start: First input, a multiple of 32.
        stop: Last input but one.
        GROUP_SIZE: Inputs that share a scale and a zero point.
        NUM_BITS: Of a code, 1 to 8.
        OPERAND: Dtype in a tensor core.
        BLOCK_M: Rows; a single one is multiplied without tensor cores.
        BLOCK_I: Inputs of a step, a multiple of 32.
        BLOCK_O: Rows of the weight.

    Returns:
        fp32 ``[BLOCK_M, BLOCK_O]``.
    """
    BLOCK_RUNS: tl.constexpr = BLOCK_I // 32
    IN_PLACE: tl.constexpr = BLOCK_M == 1
    words_ptr = codes_ptr.to(tl.pointer_type(tl.uint32))
    num_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    row_acc = tl.zeros([BLOCK_O, BLOCK_RUNS], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for first in range(start, stop, BLOCK_I):
        offs_i = first + 32 * tl.arange(0, BLOCK_RUNS)
        mask_i = offs_i < stop
        mask = mask_o[:, None] & mask_i[None, :]
        run_ptr = words_ptr + (offs_o[:, None] * (in_features // 32) + (offs_i // 32)) * NUM_BITS
        group = offs_o[:, None] * num_groups + (offs_i // GROUP_SIZE)[None, :]
        scales = tl.load(scales_ptr + group, mask=mask, other=0).to(tl.float32)
        zeros = load_codes(zeros_ptr, group, mask, NUM_BITS).to(tl.float32)
        mask_x = mask_m[:, None] & mask_i[None, :]
        total = tl.zeros([BLOCK_O, BLOCK_RUNS], dtype=tl.float32)
        word = tl.zeros([BLOCK_O, BLOCK_RUNS], dtype=tl.uint32)
        following = word
        for k in tl.static_range(32):
            word, following, weight = next_code(
                run_ptr, mask, zeros, word, following, k, NUM_BITS, IN_PLACE
            )
            x = tl.load(rows_ptr[:, None] + offs_i[None, :] + k, mask=mask_x, other=0)
            if BLOCK_M == 1:
                total += weight * (x.to(tl.float32) * (1.0 / place_of(k, NUM_BITS, IN_PLACE)))
            else:
                weight = weight * (scales * (1.0 / place_of(k, NUM_BITS, IN_PLACE)))
                weight = weight.to(x.dtype).to(OPERAND)
                acc = tl.dot(x.to(OPERAND), tl.trans(weight), acc, input_precision="ieee")
        if BLOCK_M == 1:
            row_acc += total * scales
    if BLOCK_M == 1:
        acc = tl.sum(row_acc, axis=1)[None, :]
    return acc
