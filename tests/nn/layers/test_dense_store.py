"""Unpacked weights that layers keep: never stale, never over the limit."""

import copy
from collections.abc import Iterator

import pytest
import torch
from kept_weights import kept_bytes
from tiny_artifacts import Make

from llmpress.core.errors import ConfigError
from llmpress.models.loading import load_model
from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.layers import AdaptedLinear, CompressedLinear, DenseStore, dense_bytes, keep_dense
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.nn.layers.dense_store import LIMIT
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.nn.layers.pivoted_low_rank import PivotedLowRankLinear


@pytest.fixture(autouse=True)
def without_library() -> Iterator[None]:
    """The compiled library needs no dense weights."""
    with use_backend("reference"):
        yield


@pytest.fixture
def layer() -> CodebookLinear:
    layer = CodebookLinear.from_codes(torch.randint(0, 8, (30,)), torch.randn(8, 2), 6, 10)
    layer.dense_store = DenseStore(10**6)
    return layer.requires_grad_(requires_grad=False)


def calls(layer: CompressedLinear, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each time the layer's weight is built."""
    counted: list[int] = []
    plain = type(layer).dequantize
    monkeypatch.setattr(type(layer), "dequantize", lambda self: (counted.append(1), plain(self))[1])
    return counted


def test_a_weight_is_unpacked_once(layer: CodebookLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    x, counted = torch.randn(3, 6), calls(layer, monkeypatch)
    first = layer(x)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert len(counted) == 1
    assert layer.dense_store.held == kept_bytes((10, 6)) >= 4 * 60
    layer(x.bfloat16())
    layer(x.bfloat16())
    assert len(counted) == 2
    assert layer.dense_store.held == kept_bytes((10, 6), torch.bfloat16) >= 2 * 60


def test_changed_tensors_are_unpacked_again(layer: CodebookLinear) -> None:
    x = torch.randn(3, 6)
    before = layer(x)
    with torch.no_grad():
        layer.codebook.mul_(2)  # in place
    torch.testing.assert_close(layer(x), 2 * before)
    layer.codebook.data = layer.codebook.data * 2  # another tensor
    torch.testing.assert_close(layer(x), 4 * before)


def test_other_codes_are_unpacked_again(layer: CodebookLinear) -> None:
    x = torch.randn(3, 6)
    layer(x)
    layer.codes = layer.codes.flip(0)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t())


def test_values_at_the_address_of_earlier_ones_are_other_values() -> None:
    layer = CodebookLinear.from_codes(torch.randint(0, 8, (30,)), torch.randn(4096, 2), 6, 10)
    layer.dense_store = DenseStore(10**6)
    x, own = torch.randn(3, 6), layer.codebook.data
    for factor in range(2, 9):  # each takes the memory that the one before has left
        layer.codebook.data = factor * own
        torch.testing.assert_close(layer(x), x @ layer.dequantize().t())
        layer.codebook.data = own


def test_nothing_is_kept_on_a_gpu(layer: CodebookLinear) -> None:
    layer = layer.to("meta")
    layer(torch.zeros(3, 6, device="meta"))
    assert layer.dense_store is not None
    assert layer.dense_store.held == 0


def test_nothing_is_kept_of_what_trains(layer: CodebookLinear) -> None:
    layer.codebook.data = layer.codebook.data.float()
    layer.codebook.requires_grad_()
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.codebook.grad is not None
    assert layer.dense_store.held == 0


def test_what_is_kept_is_not_used_where_gradients_are_needed(layer: CodebookLinear) -> None:
    with torch.inference_mode():
        layer(torch.randn(3, 6))
    held = layer.dense_store.held
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(dim=0).expand(3, 6))
    assert layer.dense_store.held == held


def test_autocast_takes_what_is_kept_in_its_dtype(layer: CodebookLinear) -> None:
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    expected = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert layer.dense_store.held == kept_bytes((10, 6), torch.bfloat16)


def test_the_limit_holds_and_results_do_not_depend_on_it(compressed: Make) -> None:
    tokens = torch.arange(12).view(1, 12)
    results = []
    for limit in (0, 30_000, 10**9):
        model = load_model(compressed("rtn"))
        store = DenseStore(limit)
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.dense_store = store
        with torch.no_grad():
            results.append([model(tokens).logits for _ in range(2)])
        assert store.held <= limit
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert store.held == sum(kept_bytes((m.out_features, m.in_features)) for m in layers)
    for found in results:
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        torch.testing.assert_close(found[0], results[0][0], rtol=1e-5, atol=1e-5)


def test_a_copy_keeps_its_own(layer: CodebookLinear) -> None:
    layer(torch.randn(3, 6))
    twin = copy.deepcopy(layer)
    assert twin.dense_store is not layer.dense_store
    assert twin.dense_store.held == 0


def test_layers_that_are_gone_hold_nothing() -> None:
    store, each = DenseStore(10**6), kept_bytes((10, 6))
    for _ in range(2):
        layer = CodebookLinear.from_codes(torch.zeros(30).long(), torch.ones(8, 2), 6, 10)
        layer.dense_store = store
        layer(torch.randn(3, 6))
        assert each <= store.held <= 2 * each
    del layer
    assert store.held == 0


def test_the_environment_sets_the_limit(compressed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    model = load_model(compressed("rtn"))
    with torch.no_grad():
        model(torch.arange(4).view(1, 4))
    assert dense_bytes(model) == 0
    monkeypatch.setenv(LIMIT, "a lot")
    with pytest.raises(ConfigError, match="LLMPRESS_DENSE_BYTES=a lot"):
        DenseStore()


@pytest.fixture(params=[LowRankLinear, PivotedLowRankLinear])
def small_saving(request: pytest.FixtureRequest) -> LowRankLinear:
    layer: LowRankLinear = request.param.from_factors(torch.randn(20, 6), torch.randn(6, 12))
    layer.dense_store = DenseStore(10**6)
    return layer


def test_factors_that_save_little_compute_as_one(small_saving: LowRankLinear) -> None:
    x, weight = torch.randn(3, 12).bfloat16(), small_saving.dequantize().bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(small_saving(x), x @ weight.t(), rtol=2**-7, atol=1e-2)
    assert small_saving.dense_store.held == kept_bytes((20, 12), torch.bfloat16)
    twin = copy.deepcopy(small_saving)
    twin(x.requires_grad_()).sum().backward()
    assert twin.dense_store.held == 0


def test_factors_that_save_much_stay_two() -> None:
    layer = LowRankLinear.from_factors(torch.randn(800, 1), torch.randn(1, 800))
    layer.dense_store = DenseStore(10**9)
    x = torch.randn(1, 800).bfloat16()
    with torch.no_grad():
        first = layer(x)
        layer.A.data.fill_(torch.nan)  # unnoticed: what is kept serves from here on
        torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    sizes = [kept_bytes(shape, torch.bfloat16) for shape in ((800, 1), (1, 800))]
    assert layer.dense_store.held == sum(sizes)


@pytest.fixture(params=["dense base", "compressed base"])
def adapted(request: pytest.FixtureRequest, layer: CodebookLinear) -> AdaptedLinear:
    base = torch.nn.Linear(6, 10) if request.param == "dense base" else copy.deepcopy(layer)
    made = AdaptedLinear(base, layer)
    made.keeps_sum = True
    return made


def test_one_delta_on_a_base_computes_as_their_sum(adapted: AdaptedLinear) -> None:
    x, store = torch.randn(3, 6), adapted.delta.dense_store
    apart = (adapted.base(x) + adapted.delta(x)).detach()
    held = store.held
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), apart)
    assert store.held == held + kept_bytes((10, 6))


def test_a_sum_follows_what_it_is_the_sum_of(adapted: AdaptedLinear) -> None:
    x, bias = torch.randn(3, 6), adapted.bias if adapted.bias is not None else 0
    with torch.no_grad():
        before = adapted(x) - bias
        for part in (adapted.delta, adapted.base):
            for tensor in part.parameters():
                if tensor is not adapted.bias:
                    tensor.mul_(2)
        torch.testing.assert_close(adapted(x) - bias, 2 * before)


def test_no_sum_is_kept_of_what_trains_nor_of_many(adapted: AdaptedLinear) -> None:
    x, store = torch.randn(3, 6, requires_grad=True), adapted.delta.dense_store
    with_gradients = adapted(x)
    assert store.held == 0
    adapted.keeps_sum = False
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), with_gradients)
    assert store.held == kept_bytes((10, 6))  # the delta alone


def test_all_layers_of_a_model_share_one_limit(compressed: Make) -> None:
    model = load_model(compressed("rtn"))
    stores = {m.dense_store for m in model.modules() if isinstance(m, CompressedLinear)}
    assert stores == {keep_dense(model)}
    assert dense_bytes(torch.nn.Linear(2, 2)) == 0
