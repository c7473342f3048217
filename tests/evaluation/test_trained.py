"""What was finetuned end to end is evaluated as every run is, adapters too."""

from pathlib import Path
from typing import Any

import pytest
from tiny_project import PARAMS, evaluated

from llmpress.data.tasks.arithmetic import generate
from llmpress.evaluation.sizes import delta_size
from llmpress.training.settings import Trains
from llmpress.training.stage import train_model

ITEMS = generate(12, 1, 0)["train"]
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "warmup": 0,
    "held_out": 2,
    "device": "cpu",
}


@pytest.mark.usefixtures("project")
def test_a_trained_delta_is_evaluated_on_its_base() -> None:
    out, models = Path("data/trained/followed"), Path("data/models")
    train_model(
        Path("data/compressed/delta"),
        original=models / "tuned",
        base=models / "tiny",
        trains="delta",
        items=ITEMS,
        out=out,
        **SETTINGS,
        objective="distillation",
    )
    training = {"start": "compressed/delta", "model": "tuned", "trains": "delta"}
    params = {**PARAMS, "trainings": {"followed": training}}
    metrics, details = evaluated("followed", params)
    assert (details.kind, details.method, details.base) == ("trained", "svd", "tiny")
    assert details.layers is not None
    assert metrics.size == delta_size(Path("data/compressed/delta"))
    assert metrics.size.model_bytes == (out / "delta.safetensors").stat().st_size
    assert 1e-6 < metrics.quality.kl_divergence_nats["code"] < 5


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("trains", ["lora", "qlora"])
def test_adapters_are_evaluated(trains: Trains) -> None:
    train_model(
        Path("data/models/tiny"),
        trains=trains,
        items=ITEMS,
        out=Path("data/trained/beside"),
        force=True,
        **SETTINGS,
    )
    params = {**PARAMS, "trainings": {"beside": {"model": "tiny"}}}
    metrics, details = evaluated("beside", params)
    assert (details.kind, details.method, details.layers) == ("trained", trains, None)
    assert details.training is not None
    assert details.training["trains"] == trains
    assert 1e-6 < metrics.quality.kl_divergence_nats["code"] < 5
    assert metrics.quality.tasks.keys() == {"choice", "write"}
    assert metrics.cost.finetune_seconds > 0
    assert (metrics.size.bits_per_weight > 32) == (trains == "lora")
