import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmpress.evaluation import speed as module
from llmpress.evaluation.speed import measure_speed


class Counter:
    """Counts calls of a model and remembers how many tokens each of them got."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.lengths: list[int] = []
        self.hook = model.model.embed_tokens.register_forward_hook(self)

    def __call__(self, _: object, inputs: tuple[Tensor], __: Tensor) -> None:
        self.lengths.append(inputs[0].shape[1])


@pytest.mark.parametrize(
    ("max_seconds", "expected"),
    [(1e9, 2 * [16, 1, 1, 1, 1, 1]), (0.0, [16, 1, 1])],
    ids=["fast-is-measured-twice", "slow-ends-early"],
)
def test_tokens_that_are_timed(
    max_seconds: float,
    expected: list[int],
    tiny_model: PreTrainedModel,
    tiny_windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", max_seconds)
    counter = Counter(tiny_model)
    measure_speed(tiny_model, tiny_windows[0, :16], decode_tokens=5)
    counter.hook.remove()
    assert counter.lengths == expected


def test_speeds_follow_from_the_times(
    tiny_model: PreTrainedModel, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 1.0, 1.5, 2.0, 10.0, 14.0, 14.25, 15.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(module, "MAX_SECONDS", 100.0)
    found = measure_speed(tiny_model, tiny_windows[0, :16], decode_tokens=2)
    assert found.prefill_tokens_per_second == pytest.approx(16 / 4.0)
    assert found.decode_tokens_per_second == pytest.approx(1 / 0.625)
    assert found.peak_memory_bytes > 1 << 20


def test_too_few_tokens_are_refused(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="tokens"):
        measure_speed(tiny_model, torch.zeros(4, dtype=torch.int64), decode_tokens=1)
