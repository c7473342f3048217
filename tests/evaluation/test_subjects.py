from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import PARAMS
from torch import nn
from transformers import PreTrainedModel

from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.evaluation.subjects import Subject, find_subject
from llmpress.models.loading import dequantized
from llmpress.nn.layers import AdaptedLinear, CompressedLinear

BASE, TUNED = Path("data/models/tiny"), Path("data/models/tuned")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tuned", Subject("tuned", "model", Path("data/models/tuned"), TUNED)),
        ("rtn", Subject("rtn", "compressed", Path("data/compressed/rtn"), BASE)),
        (
            "delta",
            Subject("delta", "delta", Path("data/compressed/delta"), TUNED, BASE),
        ),
        (
            "rtn-tuned",
            Subject("rtn-tuned", "finetuned", Path("data/finetuned/rtn-tuned"), BASE),
        ),
        ("beside", Subject("beside", "trained", Path("data/trained/beside"), BASE)),
        ("scales", Subject("scales", "trained", Path("data/trained/scales"), TUNED, BASE)),
    ],
    ids=["model", "run", "delta-run", "finetune", "adapter", "trained-delta"],
)
def test_what_a_name_stands_for(name: str, expected: Subject) -> None:
    trainings = {
        "beside": {"start": "models/tiny", "model": "tiny", "trains": "lora"},
        "scales": {"start": "compressed/delta", "model": "tuned", "trains": "delta"},
    }
    found = find_subject({**PARAMS, "trainings": trainings}, name)
    assert found == expected
    assert found.base == (None if expected.base_folder is None else "tiny")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'rtn-tunde'.* 'rtn-tuned'"):
        find_subject(PARAMS, "rtn-tunde")


def test_sections_may_be_empty_or_missing() -> None:
    params: dict[str, Any] = {"evaluation": PARAMS["evaluation"], "runs": None}
    assert find_subject(params, "tiny").kind == "model"


def test_a_name_twice_is_an_error() -> None:
    params = {**PARAMS, "runs": {"tiny": PARAMS["runs"]["rtn"]}}
    with pytest.raises(ConfigError, match=r"'tiny'.* evaluation\.models and runs"):
        find_subject(params, "tiny")


def kinds(model: PreTrainedModel, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.usefixtures("project")
def test_runs_load_packed() -> None:
    model = find_subject(PARAMS, "rtn").load(torch.float32, "cpu")
    assert kinds(model, CompressedLinear) == 21


@pytest.mark.usefixtures("project")
def test_a_delta_is_put_on_its_base_with_the_tokenizer_of_the_finetuned_model() -> None:
    subject = find_subject(PARAMS, "delta")
    model = subject.load(torch.float32, "cpu")
    assert kinds(model, AdaptedLinear) == 21
    tuned = find_subject(PARAMS, "tuned").load(torch.float32, "cpu")
    torch.testing.assert_close(
        dequantized(model).model.norm.weight, tuned.model.norm.weight, rtol=0, atol=0
    )
    assert subject.tokenizer().name_or_path == "data/models/tuned"


@pytest.mark.usefixtures("project")
def test_what_was_not_made_yet_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"data/finetuned/rtn-tuned"):
        find_subject(PARAMS, "rtn-tuned").load(torch.float32, "cpu")
