import pytest
import torch
from torch import Tensor

from llmpress.nn.layers.mixed_low_rank import (
    SCALE_BITS,
    MixedLowRankLinear,
    Vectors,
    dequantize_vectors,
    group_bits,
)

GROUP_SIZE = 16


def vectors(rank: int, length: int, num_bits: int) -> Vectors:
    if num_bits == 16:
        return Vectors(torch.randn(rank, length).half())
    shape = (rank, -(-length // GROUP_SIZE))
    return Vectors(
        torch.randint(1 << num_bits, (rank, length), dtype=torch.int32),
        (0.5 + torch.rand(shape)).half(),
        torch.randint(1 << num_bits, shape, dtype=torch.int32),
    )


def sample(
    ranks_and_bits: list[tuple[int, int]], shape: tuple[int, int], scale: float = 2.0**-7
) -> tuple[MixedLowRankLinear, Tensor]:
    """A layer, and the weight it has to stand for, added up triplet by triplet in fp64."""
    out_features, in_features = shape
    V = [vectors(rank, in_features, bits) for rank, bits in ranks_and_bits]
    U = [vectors(rank, out_features, bits) for rank, bits in ranks_and_bits]
    sigma = torch.rand(sum(rank for rank, _ in ranks_and_bits)).half()
    layer = MixedLowRankLinear.from_vectors(
        V,
        U,
        sigma,
        scale,
        num_bits=[bits for _, bits in ranks_and_bits],
        group_size=GROUP_SIZE,
        shape=shape,
    )
    weight = torch.zeros(shape, dtype=torch.float64)
    right = [row for v in V for row in by_hand(v)]
    left = [row for u in U for row in by_hand(u)]
    for s, u, v in zip(sigma.double(), left, right, strict=True):
        weight += scale * s * torch.outer(u, v)
    return layer, weight


def by_hand(quantized: Vectors) -> Tensor:
    if quantized.scales is None or quantized.zero_points is None:
        return quantized.codes.double()
    values = torch.full(quantized.codes.shape, torch.nan, dtype=torch.float64)
    for (row, column), code in zip(
        torch.cartesian_prod(*map(torch.arange, quantized.codes.shape)).tolist(),
        quantized.codes.reshape(-1).tolist(),
        strict=True,
    ):
        group = column // GROUP_SIZE
        zero = int(quantized.zero_points[row, group])
        values[row, column] = float(quantized.scales[row, group]) * (code - zero)
    return values


GROUPS = [[(2, 8), (5, 3), (7, 2)], [(3, 16), (4, 1)], [(1, 5)]]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", [(33, 47), (16, 32), (1, 20)], ids=str)
def test_the_weight_is_the_sum_of_its_triplets(
    groups: list[tuple[int, int]], shape: tuple[int, int]
) -> None:
    layer, weight = sample(groups, shape)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_forward_goes_through_the_thin_factors(
    groups: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, weight = sample(groups, (33, 47))

    def forbidden(_: MixedLowRankLinear) -> Tensor:
        raise AssertionError("the dense weight was formed")

    monkeypatch.setattr(MixedLowRankLinear, "dequantize", forbidden)
    x = torch.randn(2, 3, 47)
    expected = (x.double() @ weight.T).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", [(33, 47), (16, 32)], ids=str)
def test_group_bits_say_what_is_stored(
    groups: list[tuple[int, int]], shape: tuple[int, int]
) -> None:
    layer, _ = sample(groups, shape)
    out_features, in_features = shape
    counted = sum(
        group_bits(in_features, out_features, rank, bits, GROUP_SIZE) for rank, bits in groups
    )
    assert layer.stored_bits() == counted + SCALE_BITS


def test_scales_stay_few_when_a_group_has_two_triplets() -> None:
    """Scale groups run along channels: a scale per channel would cost 16 bits for 2 codes."""
    shape = (4096, 4096)
    bits = group_bits(shape[1], shape[0], 2, 8, 128)
    assert bits < 1.03 * (8 * 2 * sum(shape))


def test_no_group_at_all_is_a_delta_of_zeros() -> None:
    layer, _ = sample([], (5, 9))
    torch.testing.assert_close(layer.dequantize(), torch.zeros(5, 9))
    torch.testing.assert_close(layer(torch.ones(2, 9)), torch.zeros(2, 5))
    assert layer.stored_bits() == SCALE_BITS


def test_plain_fp16_vectors_are_kept_as_they_are() -> None:
    plain = Vectors(torch.randn(2, 9).half())
    torch.testing.assert_close(dequantize_vectors(plain, 4), plain.codes.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("groups", "group_size", "message"),
    [
        ([{"rank": 2, "num_bits": 9}], 8, r"groups\[0\]: num_bits=9"),
        ([{"rank": 1, "num_bits": 8}, {"rank": 0, "num_bits": 2}], 8, r"groups\[1\]: rank=0"),
        ([], 0, "group_size=0"),
    ],
)
def test_bad_specs_are_refused(groups: list[dict[str, int]], group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedLowRankLinear(9, 5, groups=groups, group_size=group_size)


def test_quantized_vectors_without_scales_are_refused() -> None:
    plain = [Vectors(torch.zeros(1, 9, dtype=torch.int32))]
    with pytest.raises(ValueError, match="V0: "):
        MixedLowRankLinear.from_vectors(
            plain, plain, torch.ones(1), 1.0, num_bits=[2], group_size=4, shape=(9, 9)
        )
