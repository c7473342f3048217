from typing import Any

import pytest
from tiny_project import PARAMS

from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.evaluation.settings import EvaluationSettings

VALUES = {key: value for key, value in PARAMS["evaluation"].items() if key != "models"}


def test_the_section_of_params_becomes_settings() -> None:
    settings = build(EvaluationSettings, VALUES, "evaluation")
    assert settings.corpora == ("code",)
    assert settings.tasks == {"choice": None, "write": 4}


def test_a_model_and_what_is_compared_with_it_are_asked_their_own_tasks_too() -> None:
    settings = build(
        EvaluationSettings, {**VALUES, "own_tasks": {"tuned": {"calls": 8}}}, "evaluation"
    )
    assert settings.tasks_of("tiny") == {"choice": None, "write": 4}
    assert settings.tasks_of("tuned") == {"choice": None, "write": 4, "calls": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 0}, "evaluation.windows: .* 1.* 0"),
        ({"length": 1}, "evaluation.length: .* 2.* 1"),
        ({"sample_tokens": 0}, "evaluation.sample_tokens: .* 1.* 0"),
        ({"tasks": {"choice": 1}}, "evaluation.tasks.choice: .* 2.* 1"),
        ({"own_tasks": {"tuned": {"choice": 1}}}, "own_tasks.tuned.choice: .* 2.* 1"),
        ({"dtype": "float16"}, "evaluation.dtype"),
        ({"window": 3}, "'window'.* 'windows'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(EvaluationSettings, {**VALUES, **change}, "evaluation")
