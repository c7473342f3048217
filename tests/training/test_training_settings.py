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
    ("changes", "says"),
    [
        ({"start": "compressed/smal"}, "trainings.codes.start: runs has no 'smal': did you mean"),
        ({"start": "models/tiny"}, "compressed needs compressed/NAME or finetuned/NAME"),
        ({"start": "compressed/"}, "compressed needs compressed/NAME"),
        ({"trains": "lora"}, "trainings.codes.start: lora needs models/NAME"),
        ({"trains": "all"}, "trainings.codes.trains: .*got 'all'"),
        ({"model": "other"}, "model is 'other', but compressed/small has 'tiny'"),
        ({"task": None}, "give either `task` or `corpora` to train on"),
        ({"corpora": ["code"]}, "give either `task` or `corpora` to train on"),
        ({"stat": 1}, "trainings.codes has no setting 'stat': did you mean 'start'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], says: str) -> None:
    params = copy.deepcopy(PARAMS)
    params["trainings"]["codes"] |= changes
    with pytest.raises(ConfigError, match=says):
        read_training(params, "codes")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"held_out": 0}, "held_out must be positive"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"length": 1}, "length must be at least 2"),
        ({"objective": "kl"}, "objective: .*got 'kl'"),
        ({"lr": 1}, "has no setting 'lr'"),
    ],
)
def test_settings_are_validated(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
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
    ("changes", "says"),
    [
        ({"start": "compressed/small"}, "trainings.codes.start: delta_runs has no 'small'"),
        ({"start": "finetuned/signs"}, "trainings.codes.start: delta needs compressed/NAME"),
        ({"model": "tiny"}, "model is 'tiny', but compressed/signs has 'tuned'"),
        ({"settings": {"steps": 2, "learning_rate": 1e-3}}, "objective: .*give distillation"),
        ({"settings": {**SIGNS["settings"], "norms": True}}, "norms: .*; leave it out"),
    ],
)
def test_mistakes_of_deltas_are_named(changes: dict[str, Any], says: str) -> None:
    params = copy.deepcopy(PARAMS)
    params["trainings"]["codes"] |= SIGNS | changes
    with pytest.raises(ConfigError, match=says):
        read_training(params, "codes")


def test_norms_do_not_train_beside_adapters() -> None:
    params = copy.deepcopy(PARAMS)
    entry = params["trainings"]["codes"]
    entry |= {"start": "models/tiny", "trains": "lora"}
    entry["settings"]["norms"] = True
    with pytest.raises(ConfigError, match="norms: lora trains adapters only"):
        read_training(params, "codes")
