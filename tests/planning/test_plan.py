"""Rows of a params.yaml, and the command."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from planning_examples import write_config
from typer.testing import CliRunner, Result

from llmpress.calibration.settings import CalibrationSettings
from llmpress.cli.plan import duration_text, plan
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.methods.registry import build_method
from llmpress.planning import (
    Machine,
    ModelShapes,
    measure_machine,
    plan_project,
    read_shapes,
    stages,
)
from llmpress.planning.project import project_records, task_text

PARAMS: dict[str, Any] = {
    "seed": 0,
    "models": {"tiny": {"hub": "someone/tiny@main", "license": "MIT"}},
    "corpora": {"text": {"python_stdlib": True, "license": "PSF-2.0"}},
    "tasks": {"sums": {"generator": "arithmetic", "license": "Apache-2.0"}},
    "finetuned_models": {"tiny-sums": {"base": "tiny", "task": "sums", "steps": 10}},
    "deltas": {"tiny-sums": {"base": "models/tiny", "finetuned": "tiny-sums"}},
    "calibrations": {
        name: {"corpora": ["text"], "windows": 2, "length": 32} for name in ("tiny", "tiny-sums")
    },
    "runs": {
        "three-bit": {"model": "tiny", "method": "rtn", "settings": {"num_bits": 3}},
        "clusters": {"model": "tiny", "method": "cluscomp", "settings": {"bits": 5.0}},
    },
    "delta_runs": {
        "signs": {
            "delta": "tiny-sums",
            "base": "models/tiny",
            "finetuned": "tiny-sums",
            "method": "bitdelta",
            "settings": {},
        }
    },
    "finetunes": {
        "clusters-tuned": {
            "run": "clusters",
            "model": "tiny",
            "method": "cluscomp",
            "settings": {"epochs": 1, "learning_rate": 1e-3},
        }
    },
    "trainings": {
        "clusters-sums": {
            "start": "finetuned/clusters-tuned",
            "model": "tiny",
            "trains": "compressed",
            "task": "sums",
            "settings": {"steps": 10, "learning_rate": 1e-2},
        },
        "adapter": {
            "start": "models/tiny",
            "model": "tiny",
            "trains": "lora",
            "corpora": ["text"],
            "settings": {"steps": 10, "learning_rate": 1e-3},
        },
    },
    "evaluation": {
        "models": ["tiny", "tiny-sums"],
        "corpora": ["text"],
        "windows": 1,
        "length": 32,
        "dtype": "float32",
        "tasks": {"sums": 4},
        "task_dtype": "bfloat16",
        "prefill_tokens": 8,
        "decode_tokens": 2,
        "sample_tokens": 4,
    },
}
STAGES = [
    ("train_task", "tiny-sums"),
    ("extract_delta", "tiny-sums"),
    ("calibrate", "tiny"),
    ("calibrate", "tiny-sums"),
    ("compress", "three-bit"),
    ("compress", "clusters"),
    ("compress_delta", "signs"),
    ("finetune", "clusters-tuned"),
    ("train", "clusters-sums"),
    ("train", "adapter"),
    ("reference", "tiny"),
    ("reference", "tiny-sums"),
    ("evaluate_model", "tiny"),
    ("evaluate_model", "tiny-sums"),
    ("evaluate", "three-bit"),
    ("evaluate", "clusters"),
    ("evaluate_delta", "signs"),
    ("evaluate_finetuned", "clusters-tuned"),
    ("evaluate_trained", "clusters-sums"),
    ("evaluate_trained", "adapter"),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Path:
    """A project whose model's config.json is there, on a machine of fixed size."""
    write_tiny(tmp_path / "data/models/tiny")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpress.planning.measure_machine", lambda _=None: machine)
    return tmp_path


def write_tiny(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return write_config(folder, **sizes, **heads)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, arguments)


def run_json(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def changed(section: str, name: str, **values: object) -> Mapping[str, Any]:
    entry = {**PARAMS[section].get(name, {}), **values}
    return {**PARAMS, section: {**PARAMS[section], name: entry}}


def test_one_row_for_each_stage_instance(project: Path, machine: Machine) -> None:
    made = plan_project(PARAMS, machine, root=project)

    assert [(row.stage, row.name) for row in made.rows] == STAGES
    assert made.fits
    needs = [row.need for row in made.rows if row.need and not row.problems]
    assert len(needs) == len(STAGES)
    assert all(need.artifact.num_bytes > 0 for need in needs)
    assert made.memory_bytes == max(need.host_bytes for need in needs)
    assert made.seconds == pytest.approx(sum(row.time.seconds for row in made.rows if row.time))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("three-bit", "calibrate tiny, compress three-bit, reference tiny, evaluate three-bit"),
        (
            "clusters-sums",
            "calibrate tiny, compress clusters, finetune clusters-tuned, train clusters-sums, "
            "reference tiny, evaluate_trained clusters-sums",
        ),
        ("adapter", "train adapter, reference tiny, evaluate_trained adapter"),
        (
            "signs",
            "train_task tiny-sums, extract_delta tiny-sums, calibrate tiny-sums, "
            "compress_delta signs, reference tiny-sums, evaluate_delta signs",
        ),
    ],
    ids=["run", "training", "adapter", "delta"],
)
def test_a_run_brings_what_it_is_made_from(
    name: str, expected: str, project: Path, machine: Machine
) -> None:
    made = plan_project(PARAMS, machine, names=[name], root=project)

    assert ", ".join(f"{row.stage} {row.name}" for row in made.rows) == expected


def test_an_unknown_run_is_refused_with_the_nearest(project: Path, machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"'clusers'.*'clusters'"):
        plan_project(PARAMS, machine, names=["clusers"], root=project)


def test_models_that_are_not_there_are_said_and_not_guessed(
    tmp_path: Path, machine: Machine
) -> None:
    made = plan_project(PARAMS, machine, root=tmp_path)

    assert not any(row.need for row in made.rows)
    (told,) = {problem for row in made.rows for problem in row.problems}
    assert "fetch_model.py tiny" in told
    assert made.fits


def test_a_local_model_is_planned_before_it_is_fetched(tmp_path: Path, machine: Machine) -> None:
    source = write_tiny(tmp_path / "elsewhere")
    params = {**PARAMS, "models": {"tiny": {"path": str(source), "license": "MIT"}}}

    made = plan_project(params, machine, names=["three-bit"], root=tmp_path / "project")

    assert all(row.need and not row.problems for row in made.rows)


def test_a_given_model_stands_for_every_model(
    tmp_path: Path, machine: Machine, llama_70b: ModelShapes
) -> None:
    made = plan_project(PARAMS, machine, model=llama_70b, root=tmp_path)

    rows = {(row.stage, row.name): row for row in made.rows}
    assert all(row.need for row in made.rows)
    assert not rows["compress", "three-bit"].problems
    assert "evaluation" in rows["evaluate", "three-bit"].problems[0]
    assert "`batch_size`" in rows["train_task", "tiny-sums"].problems[0]


def test_artifacts_that_are_there_need_no_disk(project: Path, machine: Machine) -> None:
    before = plan_project(PARAMS, machine, names=["three-bit"], root=project)
    write_provenance(project / "data/compressed/three-bit")
    after = plan_project(PARAMS, machine, names=["three-bit"], root=project)

    assert [row.present for row in after.rows] == [False, True, False, False]
    need = before.rows[1].need
    assert need is not None
    written = need.artifact.num_bytes + need.scratch_bytes
    assert before.disk_missing_bytes - after.disk_missing_bytes == written
    assert after.disk_bytes == before.disk_bytes


@pytest.mark.parametrize(
    ("resource", "word"), [("memory_available_bytes", "memory"), ("disk_free_bytes", "disk")]
)
def test_what_does_not_fit_is_said(
    resource: str, word: str, project: Path, machine: Machine
) -> None:
    poor = replace(machine, **{resource: 1000})

    made = plan_project(PARAMS, poor, names=["three-bit"], root=project)

    assert not made.fits
    assert all(row.problems[0].startswith(f"{word}: ") for row in made.rows)


def test_artifacts_that_fit_one_by_one_may_not_fit_together(
    project: Path, machine: Machine
) -> None:
    full = plan_project(PARAMS, machine, root=project)
    needs = [row.need for row in full.rows if row.need]
    largest = max(need.artifact.num_bytes + need.scratch_bytes for need in needs)

    made = plan_project(PARAMS, replace(machine, disk_free_bytes=largest), root=project)

    assert not any(row.problems for row in made.rows)
    assert not made.fits
    assert made.problems[0].startswith("disk: ")


def test_a_gpu_takes_the_work_and_the_host_the_rest(project: Path, machine: Machine) -> None:
    gpu = replace(machine, gpu="a GPU", device_memory_free_bytes=80 * 10**9)

    on_gpu = plan_project(PARAMS, gpu, root=project)
    on_cpu = plan_project(PARAMS, machine, root=project)

    for there, here in zip(on_gpu.rows, on_cpu.rows, strict=True):
        assert there.need is not None
        assert here.need is not None
        assert here.need.device_bytes == 0
        assert there.need.device_bytes > 0 or there.stage == "extract_delta"
        assert there.need.host_bytes + there.need.device_bytes == here.need.host_bytes
    tight = plan_project(PARAMS, replace(gpu, device_memory_free_bytes=1000), root=project)
    assert tight.rows[0].problems[0].startswith("GPU memory: ")


def test_budgets_that_cannot_be_met_name_the_run(project: Path, machine: Machine) -> None:
    params = changed("runs", "clusters", settings={"bits": 0.2})
    with pytest.raises(ConfigError, match=r"compress clusters: bits=0\.2"):
        plan_project(params, machine, root=project)


def write_provenance(folder: Path, **about: object) -> None:
    folder.mkdir(parents=True)
    hardware = {"processor": "a processor", "gpu": None, "threads": 1, "cores": 2}
    made = {"created": "2026-11-28T00:00:00", "hardware": hardware, **about}
    (folder / "provenance.json").write_text(json.dumps(made))


def test_finished_stages_tell_how_long_others_take(project: Path, machine: Machine) -> None:
    """By the settings that they had then, on whatever model is asked for."""
    then = {"corpora": ["text"], "windows": 8, "length": 64, "seed": 0}
    write_provenance(project / "data/calibration/tiny", settings=then, seconds=40.0)
    settings = {"method": "rtn", **asdict(build_method("rtn", {"num_bits": 4}, "test")), "seed": 0}
    write_provenance(project / "data/compressed/three-bit", settings=settings, seconds=3.0)
    large = write_config(project / "large", hidden_size=128, intermediate_size=352)
    small, wide = read_shapes(project / "data/models/tiny"), read_shapes(large)

    made = plan_project(PARAMS, machine, names=["three-bit"], model=wide, root=project)

    calibration, compression, *_ = (row.time for row in made.rows)
    assert calibration is not None
    assert compression is not None
    earlier = CalibrationSettings(("text",), windows=8, length=64)
    now = CalibrationSettings(("text",), windows=2, length=32)
    scaled = stages.calibrate(wide, now).work / stages.calibrate(small, earlier).work
    assert calibration.seconds == pytest.approx(40.0 * scaled)
    method = build_method("rtn", {"num_bits": 3}, "test")
    scaled = stages.compress(wide, method).work / stages.compress(small, method).work
    assert compression.seconds == pytest.approx(3.0 * scaled)
    assert calibration.machine == compression.machine == "this processor"


def test_an_evaluation_leaves_a_record(project: Path, machine: Machine) -> None:
    evaluation = {"windows": 2, "length": 32, "dtype": "float32", "task_items": {"sums": 4}}
    hardware = {"processor": "a processor", "gpu": None, "threads": 1}
    made = {"seconds": {"all": 5.0}, "hardware": hardware, "created": "2026-11-28T00:00:00"}
    details = {
        "evaluation": {**evaluation, "tokens_scored": {"text": 62}},
        "provenance": {"evaluation": made},
    }
    (project / "results/details").mkdir(parents=True)
    (project / "results/details/tiny.json").write_text(json.dumps(details))

    (record,) = project_records(PARAMS, project)

    assert (record.stage, record.seconds, record.processor) == ("evaluate", 5.0, "a processor")
    row = plan_project(PARAMS, machine, names=["three-bit"], root=project).rows[-1]
    assert row.time is not None
    assert row.time.basis.startswith("1 of this processor")


@pytest.mark.parametrize(
    "about", [{}, {"settings": {"method": "gptq"}, "seconds": 3.0}], ids=["too old", "other method"]
)
def test_what_tells_nothing_is_passed_over(about: dict[str, Any], project: Path) -> None:
    write_provenance(project / "data/compressed/three-bit", **about)
    assert project_records(PARAMS, project) == []


@pytest.mark.usefixtures("project")
def test_json_has_every_number_with_its_unit() -> None:
    made = run_json()

    assert set(made["rows"][0]) == {"stage", "name", "need", "time", "present", "problems"}
    assert set(made["rows"][0]["need"]) == {
        "work",
        "artifact",
        "device_bytes",
        "host_bytes",
        "mapped_bytes",
        "scratch_bytes",
    }
    assert set(made) >= {"memory_bytes", "disk_bytes", "disk_missing_bytes", "seconds"}
    assert made["machine"]["memory_available_bytes"] == 16 * 10**9


@pytest.mark.usefixtures("project")
def test_the_table_and_its_exit_code() -> None:
    result = run("three-bit")

    assert result.exit_code == 0
    for word in ("compress", "three-bit", "calibrate", "available", "yes"):
        assert word in result.stdout


@pytest.mark.usefixtures("project")
def test_exit_code_3_when_something_does_not_fit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = replace(machine, memory_available_bytes=1000)
    monkeypatch.setattr("llmpress.planning.measure_machine", lambda _=None: poor)

    result = run("three-bit")

    assert result.exit_code == 3
    assert "NO" in result.stdout
    assert "`windows`" in " ".join(result.stdout.split())


def test_unfetched_models_in_the_table(project: Path) -> None:
    (project / "data/models/tiny/config.json").unlink()

    result = run("three-bit")

    assert result.exit_code == 0
    assert "unknown" in result.stdout
    assert "fetch the model first" in result.stdout


def test_one_compression_without_a_params_file(project: Path) -> None:
    (project / "params.yaml").unlink()
    config = str(project / "data/models/tiny/config.json")

    made = run_json("--model", config, "--method", "cluscomp", "--set", "bits=5.0")

    (row,) = made["rows"]
    assert (row["stage"], row["name"], row["problems"]) == ("compress", "tiny", [])
    lower = run_json("--model", config, "--method", "cluscomp", "--bits", "4")
    sizes = [made["rows"][0]["need"]["artifact"]["tensor_bytes"] for made in (lower, made)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "rnt"], "'rtn'"),
        (["--method", "rtn", "--set", "num_bit=3"], "'num_bits'"),
        (["--method", "rtn", "three-bit"], "leave the names"),
        (["--set", "bits=3"], "need a --method"),
    ],
    ids=["method", "setting", "names", "no method"],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, project: Path) -> None:
    result = run("--model", str(project / "data/models/tiny"), *arguments)

    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.usefixtures("project")
def test_method_without_model() -> None:
    assert isinstance(run("--method", "rtn").exception, ConfigError)
    assert isinstance(run("--model", "nowhere").exception, ArtifactError)


@pytest.mark.parametrize(
    ("seconds", "ends", "text"),
    [
        (6.2, (5.0, 20.6), "6.2 s (5-21)"),
        (150.0, (60.0, 240.0), "2.5 min (1-4)"),
        (4 * 3600.0, (4 * 3600.0, 4 * 3600.0), "4 h"),
        (5 * 86400.0, (), "5 days"),
        (0.5, (), "0.5 s"),
    ],
    ids=str,
)
def test_durations(seconds: float, ends: tuple[float, ...], text: str) -> None:
    assert duration_text(seconds, *ends) == text


def test_items_are_measured() -> None:
    items = [{"query": "How far?", "choices": ["near", "far away from here"]}] * 9
    items.append({"query": "Q" * 420, "choices": ["a", "b"]})

    every, few = task_text(items), task_text(items, generated=5, drawn=2)

    assert every.tokens == pytest.approx((9 * 26 + 9 * 8 + 2 * 421) / 4.2 / 10, rel=0.2)
    assert every.longest == pytest.approx(421 / 4.2)
    assert few.longest < 10  # two of ten items hardly meet the longest
    assert few.generated == 5
    digits = task_text([{"query": "12345", "target": "6"}])
    assert digits.tokens == 6


def test_this_machine_is_measured(tmp_path: Path) -> None:
    measured = measure_machine(tmp_path)

    assert measured.memory_available_bytes > 0
    assert measured.disk_free_bytes > 0
    assert measured.processor
