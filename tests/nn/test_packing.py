import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpress.nn.packing import MAX_BITS, pack, packed_size, unpack

WIDTHS = range(1, MAX_BITS + 1)


@st.composite
def values_of_a_width(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_bits = draw(st.sampled_from(WIDTHS))
    return num_bits, draw(st.lists(st.integers(0, (1 << num_bits) - 1), max_size=70))


@given(values_of_a_width())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_values_come_back(case: tuple[int, list[int]]) -> None:
    num_bits, values = case
    packed = pack(torch.tensor(values, dtype=torch.int64), num_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(len(values), num_bits),)
    unpacked = unpack(packed, num_bits, len(values))
    assert unpacked.dtype == torch.int32
    assert unpacked.tolist() == values


@given(values_of_a_width())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_layout_is_one_little_endian_bit_stream(case: tuple[int, list[int]]) -> None:
    num_bits, values = case
    stream = sum(value << (i * num_bits) for i, value in enumerate(values))
    expected = stream.to_bytes(packed_size(len(values), num_bits), "little")
    assert bytes(pack(torch.tensor(values, dtype=torch.int64), num_bits).tolist()) == expected


@pytest.mark.parametrize("num_bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_largest_value_at_every_place(num_bits: int, count: int) -> None:
    values = torch.full((count,), (1 << num_bits) - 1)
    torch.testing.assert_close(unpack(pack(values, num_bits), num_bits, count).long(), values)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_rows_are_read_in_order(num_bits: int) -> None:
    values = torch.randint(1 << num_bits, (5, 13))
    torch.testing.assert_close(pack(values, num_bits), pack(values.flatten(), num_bits))
    torch.testing.assert_close(pack(values.T, num_bits), pack(values.T.flatten(), num_bits))


@pytest.mark.parametrize("value", [-1, 8])
def test_value_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="3 bits"):
        pack(torch.tensor([0, value, 7]), 3)


@pytest.mark.parametrize("num_bits", [0, -1, 17])
def test_width_out_of_range_is_refused(num_bits: int) -> None:
    with pytest.raises(ValueError, match=f"num_bits={num_bits}"):
        pack(torch.zeros(3, dtype=torch.int32), num_bits)
    with pytest.raises(ValueError, match=f"num_bits={num_bits}"):
        unpack(torch.zeros(3, dtype=torch.uint8), num_bits, 1)


def test_byte_string_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 bytes.* 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 8)
