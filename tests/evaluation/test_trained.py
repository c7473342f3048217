"""What was finetuned end to end is evaluated as every run is, adapters too."""

from pathlib import Path

import pytest
import torch
from tiny_project import PARAMS

from llmpress.core.params import build
from llmpress.data.tasks.arithmetic import generate
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.evaluation.sizes import delta_size
from llmpress.evaluation.stage import evaluate
from llmpress.evaluation.subjects import find_subject
from llmpress.training.data import task_data
from llmpress.training.settings import FinetuningSettings, Trains
from llmpress.training.stage import finetune_artifact

ITEMS = generate(12, 1, 0)["train"]


@pytest.mark.usefixtures("project")
def test_a_trained_delta_is_evaluated_on_its_base() -> None:
    settings = FinetuningSettings(
        steps=2, learning_rate=1e-2, batch_size=2, warmup=0, held_out=2, objective="distillation"
    )
    out, models = Path("data/trained/followed"), Path("data/models")
    finetune_artifact(
        Path("data/compressed/delta"),
        models / "tuned",
        out,
        trains="delta",
        settings=settings,
        data=lambda tokenizer: task_data(ITEMS, tokenizer, settings, 0),
        inputs={},
        described={"task": "arithmetic"},
        seed=0,
        device=torch.device("cpu"),
        base=models / "tiny",
    )
    training = {"start": "compressed/delta", "model": "tuned", "trains": "delta"}
    params = {**PARAMS, "trainings": {"followed": training}}
    values = {k: v for k, v in PARAMS["evaluation"].items() if k != "models"}
    how = build(EvaluationSettings, values, "evaluation")
    metrics, details = evaluate(find_subject(params, "followed"), how, "cpu")
    assert (details.kind, details.method, details.base) == ("trained", "svd", "tiny")
    assert details.layers is not None
    assert metrics.size == delta_size(Path("data/compressed/delta"))
    assert metrics.size.model_bytes == (out / "delta.safetensors").stat().st_size
    assert 1e-6 < metrics.quality.kl_divergence_nats["code"] < 5


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("trains", ["lora", "qlora"])
def test_adapters_are_evaluated(trains: Trains) -> None:
    settings = FinetuningSettings(steps=2, learning_rate=1e-2, batch_size=2, warmup=0, held_out=2)
    model = Path("data/models/tiny")
    finetune_artifact(
        model,
        model,
        Path("data/trained/beside"),
        trains=trains,
        settings=settings,
        data=lambda tokenizer: task_data(ITEMS, tokenizer, settings, 0),
        inputs={},
        described={"task": "arithmetic"},
        seed=0,
        device=torch.device("cpu"),
    )
    params = {**PARAMS, "trainings": {"beside": {"model": "tiny"}}}
    values = {k: v for k, v in PARAMS["evaluation"].items() if k != "models"}
    how = build(EvaluationSettings, values, "evaluation")
    metrics, details = evaluate(find_subject(params, "beside"), how, "cpu")
    assert (details.kind, details.method, details.layers) == ("trained", trains, None)
    assert details.training is not None
    assert details.training["trains"] == trains
    assert 1e-6 < metrics.quality.kl_divergence_nats["code"] < 5
    assert metrics.quality.tasks.keys() == {"choice", "write"}
    assert metrics.cost.finetune_seconds > 0
    assert metrics.speed.decode_tokens_per_second > 0
    assert (metrics.size.bits_per_weight > 32) == (trains == "lora")
