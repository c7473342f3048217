import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_project import PARAMS
from torch import Tensor
from transformers import PreTrainedModel

from llmpress.core.errors import ConfigError
from llmpress.evaluation import speed as module
from llmpress.evaluation.metrics import Speed
from llmpress.evaluation.reference import make_reference
from llmpress.evaluation.speed import in_turns, time_generation

SCRIPT = Path(__file__).parents[2] / "workflow/scripts/speed.py"


class Counter:
    """Counts calls of a model and remembers how many tokens each of them got."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.lengths: list[int] = []
        self.hook = model.model.embed_tokens.register_forward_hook(self)

    def __call__(self, _: object, inputs: tuple[Tensor], __: Tensor) -> None:
        self.lengths.append(inputs[0].shape[1])


@pytest.mark.parametrize(
    ("max_seconds", "expected"),
    [(1e9, [16, 1, 1, 1, 1, 1]), (0.0, [16, 1, 1])],
    ids=["all", "slow-ends-early"],
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
    time_generation(tiny_model, tiny_windows[0, :16], decode_tokens=5)
    counter.hook.remove()
    assert counter.lengths == expected


def test_times_are_those_of_the_first_and_of_further_tokens(
    tiny_model: PreTrainedModel, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([10.0, 14.0, 14.25, 15.25])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(module, "MAX_SECONDS", 100.0)
    found = time_generation(tiny_model, tiny_windows[0, :16], decode_tokens=2)
    assert (found.prefill_seconds, found.decode_seconds) == (4.0, 0.625)


def test_models_are_timed_in_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(module, "time_generation", lambda model, *_: calls.append(model) or model)
    models: Any = ("run", "original")
    found = in_turns(models, torch.zeros(4, dtype=torch.int64), 2, rounds=2)
    assert calls == ["run", "original"] * 3
    assert found == [["run"] * 2, ["original"] * 2]


def test_too_few_tokens_are_refused(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="tokens"):
        time_generation(tiny_model, torch.zeros(4, dtype=torch.int64), decode_tokens=1)


def run_script(**settings: Any) -> dict[str, Any]:
    Path("params.yaml").write_text(yaml.safe_dump({**PARAMS, "speed": settings}), encoding="utf-8")
    runpy.run_path(str(SCRIPT))["main"](Path("params.yaml"), Path("results/speed.json"))
    found: dict[str, Any] = json.loads(Path("results/speed.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.usefixtures("project")
def test_the_script_times_runs_and_deltas_against_their_originals() -> None:
    for name in ("tiny", "tuned"):
        make_reference(
            f"data/models/{name}",
            text=Path("data/corpora/code"),
            out=f"data/references/{name}",
            windows=2,
            length=64,
            device="cpu",
        )
    found = run_script(runs=["rtn", "delta"], prefill_tokens=16, decode_tokens=3, rounds=2)
    assert Speed.model_validate(found).model_dump() == found
    assert {name: run["original"] for name, run in found["runs"].items()} == {
        "rtn": "tiny",
        "delta": "tuned",
    }
    for run in found["runs"].values():
        assert all(ratio > 0 for ratio in run["prefill_ratios"] + run["decode_ratios"])
        assert len(run["prefill_ratios"]) == len(run["decode_ratios"]) == 2


@pytest.mark.usefixtures("project")
def test_no_run_is_measured_where_none_is_asked_for() -> None:
    assert run_script(runs=[])["runs"] == {}


@pytest.mark.usefixtures("project")
def test_an_unknown_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        run_script(runs=["rtm"])
    assert "'rtm'" in capsys.readouterr().err
