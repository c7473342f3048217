import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from tiny_project import CHOICE_TASK, choice_rows, evaluated, write_task

from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.evaluation.metrics import Details, Metrics
from llmpress.evaluation.reference import make_reference

SCRIPT = Path(__file__).parents[2] / "workflow/scripts/evaluate.py"


@pytest.mark.usefixtures("project")
def test_a_model_is_its_own_original() -> None:
    metrics, details = evaluated("tiny")
    assert metrics.quality.kl_divergence_nats == {"code": 0.0}
    assert metrics.quality.top1_agreement == {"code": 1.0}
    assert 1 < metrics.quality.perplexity["code"] < 512
    assert {name: task.num_items for name, task in metrics.quality.tasks.items()} == {
        "choice": 8,
        "write": 4,
    }
    assert (details.kind, details.method, details.layers) == ("model", None, None)
    assert details.original == "tiny"
    assert details.provenance.source is None
    assert details.evaluation.tokens_scored == {"code": 2 * 63}
    assert {name: len(answers) for name, answers in details.answers.items()} == {
        "choice": 8,
        "write": 4,
    }
    for name, answers in details.answers.items():
        assert fmean(answers) == pytest.approx(metrics.quality.tasks[name].accuracy)


@pytest.mark.usefixtures("project")
def test_tasks_of_one_name_in_two_folders_are_two() -> None:
    tasks = {"choice": 3, "../../other/choice": 5}
    write_task(Path("other/choice"), CHOICE_TASK, choice_rows())
    metrics, details = evaluated("tiny", tasks=tasks)
    asked = {name: task.num_items for name, task in metrics.quality.tasks.items()}
    assert asked == {"tasks/choice": 3, "other/choice": 5}
    assert {name: len(answers) for name, answers in details.answers.items()} == asked
    with pytest.raises(ConfigError, match="twice"):
        evaluated("tiny", tasks={"choice": 3, "./../tasks/../tasks/choice/.": 5})


@pytest.mark.usefixtures("project")
def test_a_run_is_compared_with_its_model() -> None:
    metrics, details = evaluated("rtn", tasks={})
    assert 1e-4 < metrics.quality.kl_divergence_nats["code"] < 1
    assert metrics.quality.top1_agreement["code"] > 0.5
    means = details.windows["code"]
    first, second = means.kl_divergence_nats
    assert fmean((first, second)) == pytest.approx(metrics.quality.kl_divergence_nats["code"])
    assert metrics.quality.kl_divergence_stderr_nats["code"] == pytest.approx(
        abs(first - second) / 2
    )
    assert math.exp(fmean(means.loss_nats)) == pytest.approx(metrics.quality.perplexity["code"])
    assert len(means.top1_agreement) == 2
    assert 4 < metrics.size.bits_per_weight < 5
    assert (details.kind, details.method) == ("compressed", "rtn")
    assert details.settings == {"num_bits": 4, "group_size": 32}
    assert details.layers is not None
    assert len(details.layers["layers"]) == 21
    assert details.provenance.source is not None
    assert details.provenance.artifact["inputs"] == {
        "model": details.provenance.source["fingerprint"]
    }
    assert len(details.samples) == 3


@pytest.mark.usefixtures("project")
def test_a_delta_is_compared_with_the_finetuned_model() -> None:
    metrics, details = evaluated("delta", tasks={})
    base, _ = evaluated("tiny", tasks={})
    tuned, _ = evaluated("tuned", tasks={})
    perplexity = {
        name: found.quality.perplexity["code"]
        for name, found in (("base", base), ("tuned", tuned), ("delta", metrics))
    }
    assert abs(perplexity["delta"] - perplexity["tuned"]) < abs(
        perplexity["base"] - perplexity["tuned"]
    )
    assert 0 < metrics.quality.kl_divergence_nats["code"] < 0.1
    assert (details.kind, details.base, details.original) == ("delta", "tiny", "tuned")


@pytest.mark.usefixtures("project")
def test_the_same_evaluation_gives_the_same_numbers() -> None:
    first, second = (evaluated("rtn")[0].quality for _ in range(2))
    assert first == second


@pytest.mark.usefixtures("project")
def test_a_single_window_has_no_standard_error() -> None:
    quality = evaluated("rtn", tasks={}, windows=1)[0].quality
    assert quality.perplexity_stderr == {"code": None}


@pytest.mark.usefixtures("project")
def test_too_little_text_names_the_corpus() -> None:
    with pytest.raises(SourceError, match=r"text code: 900 windows of 64 tokens"):
        evaluated("tiny", windows=900)


@pytest.mark.usefixtures("project")
def test_a_missing_task_is_named_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmpress.evaluation.stage.run_original", None)
    with pytest.raises(ArtifactError, match=r"data/tasks/quiz"):
        evaluated("tiny", tasks={"quiz": 4})


@pytest.mark.usefixtures("project")
def test_a_missing_tokenizer_is_named() -> None:
    for file in Path("data/models/tiny").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ArtifactError, match=r"data/models/tiny/tokenizer"):
        evaluated("tiny")


@pytest.fixture
def script(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The stage script's main function, in this process."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    make_reference(
        "data/models/tiny",
        text=Path("data/corpora/code"),
        out="data/references/tiny",
        windows=2,
        length=64,
        device="cpu",
    )
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda key: main(key, project / "params.yaml")


def test_the_script_writes_both_files(
    script: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    script("rtn")
    metrics = json.loads(Path("results/metrics/rtn.json").read_text(encoding="utf-8"))
    assert Metrics.model_validate(metrics).model_dump() == metrics
    details = json.loads(Path("results/details/rtn.json").read_text(encoding="utf-8"))
    assert Details.model_validate(details).name == "rtn"
    out, err = capsys.readouterr()
    assert out == ""
    assert "likelihood on code" in err
    assert "WARNING" not in err


def test_the_script_says_what_is_wrong_in_one_line(
    script: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("data/compressed/rtn")
    for key, message in (
        ("rtn", "error: data/compressed/rtn"),
        ("rtm", "error: 'rtm' is no model or run to evaluate: did you mean 'rtn'?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script(key)
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(message)
    assert not Path("results").exists()
