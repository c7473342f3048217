"""Unpacked weights that layers keep: never stale, never over the limit."""

import copy

import pytest
import torch
from tiny_artifacts import Make

from llmpress.errors import ConfigError
from llmpress.hf import load_model
from llmpress.layers import CodebookLinear, CompressedLinear, DenseStore, dense_bytes, keep_dense
from llmpress.layers.dense_store import LIMIT


@pytest.fixture
def layer() -> CodebookLinear:
    layer = CodebookLinear.from_codes(torch.randint(0, 8, (30,)), torch.randn(8, 2), 6, 10)
    layer.dense_store = DenseStore(10**6)
    return layer


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
    assert layer.dense_store.held == 4 * 60
    layer(x.bfloat16())
    layer(x.bfloat16())
    assert len(counted) == 2
    assert layer.dense_store.held == 2 * 60


def test_changed_tensors_are_unpacked_again(layer: CodebookLinear) -> None:
    x = torch.randn(3, 6)
    before = layer(x)
    with torch.no_grad():
        layer.codebook.mul_(2)  # in place
    torch.testing.assert_close(layer(x), 2 * before)
    layer.codebook.data = layer.codebook.data * 2  # another tensor
    torch.testing.assert_close(layer(x), 4 * before)


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


def test_what_was_unpacked_for_inference_serves_gradients_later(layer: CodebookLinear) -> None:
    with torch.inference_mode():
        layer(torch.randn(3, 6))
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(dim=0).expand(3, 6))


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
    assert store.held == sum(
        4 * m.num_weights for m in model.modules() if isinstance(m, CompressedLinear)
    )
    for found in results:
        for logits in found:
            torch.testing.assert_close(logits, results[0][0], rtol=0, atol=0)


def test_a_copy_keeps_its_own(layer: CodebookLinear) -> None:
    layer(torch.randn(3, 6))
    twin = copy.deepcopy(layer)
    assert twin.dense_store is not layer.dense_store
    assert twin.dense_store.held == 0


def test_layers_that_are_gone_hold_nothing() -> None:
    store = DenseStore(10**6)
    for _ in range(2):
        layer = CodebookLinear.from_codes(torch.zeros(30).long(), torch.ones(8, 2), 6, 10)
        layer.dense_store = store
        layer(torch.randn(3, 6))
        assert store.held <= 2 * 240
    del layer
    assert store.held == 0


def test_the_environment_sets_the_limit(compressed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    model = load_model(compressed("rtn"))
    with torch.no_grad():
        model(torch.arange(4).view(1, 4))
    assert dense_bytes(model) == 0
    monkeypatch.setenv(LIMIT, "a lot")
    with pytest.raises(ConfigError, match="LLMPRESS_DENSE_BYTES=a lot: give a number of bytes"):
        DenseStore()


def test_all_layers_of_a_model_share_one_limit(compressed: Make) -> None:
    model = load_model(compressed("rtn"))
    stores = {m.dense_store for m in model.modules() if isinstance(m, CompressedLinear)}
    assert stores == {keep_dense(model)}
    assert dense_bytes(torch.nn.Linear(2, 2)) == 0
