import pytest
import torch

from llmpress.nn.layers.sparse import SparseLinear, index_bits, smaller_index, sparse_bits


def random_sparse(shape: tuple[int, int], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    # half-precision values, so that storing them in fp16 loses nothing
    return torch.randn(shape).half().float(), torch.rand(shape) < density


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (33, 65), (8, 128)], ids=str)
def test_entries_come_back_to_their_places(shape: tuple[int, int], density: float) -> None:
    weight, keep = random_sparse(shape, density)
    layer = SparseLinear.from_dense(weight, keep)
    torch.testing.assert_close(layer.dequantize(), weight * keep, rtol=0, atol=0)
    assert layer.stored_bits() == sparse_bits(shape[1], shape[0], int(keep.sum()))


@pytest.mark.parametrize(("density", "index"), [(0.02, "columns"), (0.3, "bitmap")])
def test_the_smaller_index_is_stored(density: float, index: str) -> None:
    weight, keep = random_sparse((50, 300), density)
    layer = SparseLinear.from_dense(weight, keep)
    assert layer.spec()["index"] == index
    names = {"columns": {"row_counts", "columns"}, "bitmap": {"bitmap"}}[index]
    assert set(layer.tensors()) == {*names, "values", "scale"}
    count = int(keep.sum())
    sizes = {kind: index_bits(300, 50, count, kind) for kind in ("columns", "bitmap")}
    assert min(sizes, key=sizes.__getitem__) == index
    assert layer.stored_bits() == sizes[index] + 16 * count + 32


def test_rows_too_long_to_pack_their_columns_get_a_bitmap() -> None:
    assert smaller_index(65535, 1, 1) == "columns"
    assert smaller_index(65536, 1, 1) == "bitmap"


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-6, 1.0, 1e6, 2.2e38])
def test_digits_survive_any_size_of_the_weights(factor: float) -> None:
    weight = torch.rand(6, 10) + 0.5
    layer = SparseLinear.from_dense(weight * factor, torch.ones(6, 10, dtype=torch.bool))
    torch.testing.assert_close(layer.dequantize() / factor, weight, rtol=6e-4, atol=0)


def test_numbers_below_the_normal_ones_stay_finite() -> None:
    weight = torch.tensor([[1e-42, -2e-42, 0.0]])
    dequantized = SparseLinear.from_dense(weight, weight != 0).dequantize()
    torch.testing.assert_close(dequantized, weight, rtol=0, atol=1e-41)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nonzeros": 13, "index": "bitmap"}, "num_nonzeros=.*12"),
        ({"num_nonzeros": -1, "index": "bitmap"}, "num_nonzeros=.*12"),
        ({"num_nonzeros": 3, "index": "rows"}, "'bitmap' and 'columns'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(4, 3, **arguments)
