"""What params.yaml may say of trainings, and the line that names a mistake."""

import copy
from pathlib import Path
from typing import Any

import pytest

from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.training.settings import FinetuningSettings, base_folder, read_training

PARAMS: dict[str, Any] = {
    "runs": {"small": {"model": "tiny", "method": "cluscomp"}},
    "finetunes": {"small-tuned": {"run": "small", "model": "tiny"}},
    "delta_runs": {"signs": {"base": "models/tiny", "finetuned": "tuned", "method": "bitdelta"}},
    "trainings": {
        "codes": {
            "start": "compressed/small",
            "model": "tiny",
            "trains": "compressed",
            "task": "sums",
            "settings": {"steps": 2, "learning_rate": 1e-3},
        },
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": "finetuned/small-tuned"},
        {"start": "models/tiny", "trains": "lora"},
        {"start": "models/tiny", "trains": "qlora", "task": None, "corpora": ["code"]},
    ],
)
def test_trainings_that_fit(changes: dict[str, Any]) -> None:
    params = copy.deepcopy(PARAMS)
    params["trainings"]["codes"] |= changes
    assert read_training(params, "codes").model == "tiny"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start": "compressed/smal"}, r"trainings\.codes\.start.*'smal'.* 'small'"),
        ({"start": "models/tiny"}, "compressed/NAME or finetuned/NAME"),
        ({"start": "compressed/"}, "compressed/NAME"),
        ({"trains": "lora"}, r"trainings\.codes\.start.* models/NAME"),
        ({"trains": "all"}, r"trainings\.codes\.trains.*'all'"),
        ({"model": "other"}, "'other'.* compressed/small .*'tiny'"),
        ({"task": None}, "`task` or `corpora`"),
        ({"corpora": ["code"]}, "`task` or `corpora`"),
        ({"stat": 1}, r"trainings\.codes .*'stat'.* 'start'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], named: str) -> None:
    params = copy.deepcopy(PARAMS)
    params["trainings"]["codes"] |= changes
    with pytest.raises(ConfigError, match=named):
        read_training(params, "codes")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"steps": 0}, "steps: .*0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"held_out": 0}, "held_out"),
        ({"warmup": -1}, "warmup"),
        ({"length": 1}, "length"),
        ({"objective": "kl"}, "objective.*'kl'"),
        ({"lr": 1}, "'lr'"),
    ],
)
def test_settings_are_validated(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(FinetuningSettings, {"steps": 1, "learning_rate": 1e-3, **values}, "here")


SIGNS: dict[str, Any] = {
    "start": "compressed/signs",
    "model": "tuned",
    "trains": "delta",
    "settings": {"steps": 2, "learning_rate": 1e-3, "objective": "distillation"},
}


def test_a_delta_trains_on_its_base() -> None:
    params = copy.deepcopy(PARAMS)
    assert base_folder(params, read_training(params, "codes")) is None
    params["trainings"]["codes"] |= SIGNS
    assert base_folder(params, read_training(params, "codes")) == Path("data/models/tiny")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start": "compressed/small"}, r"trainings\.codes\.start: delta_runs .*'small'"),
        ({"start": "finetuned/signs"}, r"trainings\.codes\.start.* compressed/NAME"),
        ({"model": "tiny"}, "'tiny'.* compressed/signs .*'tuned'"),
        ({"settings": {"steps": 2, "learning_rate": 1e-3}}, "objective.* distillation"),
        ({"settings": {**SIGNS["settings"], "norms": True}}, "norms"),
    ],
)
def test_mistakes_of_deltas_are_named(changes: dict[str, Any], named: str) -> None:
    params = copy.deepcopy(PARAMS)
    params["trainings"]["codes"] |= SIGNS | changes
    with pytest.raises(ConfigError, match=named):
        read_training(params, "codes")


def test_norms_do_not_train_beside_adapters() -> None:
    params = copy.deepcopy(PARAMS)
    entry = params["trainings"]["codes"]
    entry |= {"start": "models/tiny", "trains": "lora"}
    entry["settings"]["norms"] = True
    with pytest.raises(ConfigError, match=r"norms.* lora"):
        read_training(params, "codes")
