"""Rows of a params.yaml, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from planning_examples import write_config
from typer.testing import CliRunner, Result

from llmpress.cli.plan import duration_text, plan
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.planning import (
    Machine,
    ModelShapes,
    measure_machine,
    plan_project,
)
from llmpress.planning.records import read_records

PARAMS: dict[str, Any] = yaml.safe_load("""
seed: 0
models: {tiny: {hub: someone/tiny@main, license: MIT}}
corpora: {text: {python_stdlib: true, license: PSF-2.0}}
tasks: {sums: {generator: arithmetic, license: Apache-2.0}}
finetuned_models: {tiny-sums: {base: tiny, task: sums, steps: 10}}
deltas: {tiny-sums: {base: models/tiny, finetuned: tiny-sums}}
calibrations:
  tiny: {corpora: [text], windows: 2, length: 32}
  tiny-sums: {corpora: [text], windows: 2, length: 32}
runs:
  three-bit: {model: tiny, method: rtn, settings: {num_bits: 3}}
  clusters: {model: tiny, method: cluscomp, settings: {bits: 5.0}}
delta_runs:
  signs: {delta: tiny-sums, base: models/tiny, finetuned: tiny-sums, method: bitdelta}
finetunes:
  clusters-tuned:
    {run: clusters, model: tiny, method: cluscomp, settings: {epochs: 1, learning_rate: 1.0e-3}}
trainings:
  clusters-sums:
    start: finetuned/clusters-tuned
    model: tiny
    trains: compressed
    task: sums
    settings: {steps: 10, learning_rate: 1.0e-2}
  adapter:
    start: models/tiny
    model: tiny
    trains: lora
    corpora: [text]
    settings: {steps: 10, learning_rate: 1.0e-3}
speed: {runs: []}
evaluation:
  models: [tiny, tiny-sums]
  corpora: [text]
  windows: 1
  length: 32
  dtype: float32
  tasks: {sums: 4}
  own_tasks: {}
  task_dtype: bfloat16
  split: test
  sample_tokens: 4
""")
DVC_YAML = Path(__file__).parents[2] / "dvc.yaml"
STAGES = (
    "train_task tiny-sums, extract_delta tiny-sums, calibrate tiny, calibrate tiny-sums, "
    "compress three-bit, compress clusters, compress_delta signs, finetune clusters-tuned, "
    "train clusters-sums, train adapter, reference tiny, reference tiny-sums, "
    "evaluate_model tiny, evaluate_model tiny-sums, "
    "evaluate three-bit, evaluate clusters, evaluate_delta signs, "
    "evaluate_finetuned clusters-tuned, evaluate_trained clusters-sums, evaluate_trained adapter"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Path:
    """A project whose model's config.json is there, on a machine of fixed size."""
    write_tiny(tmp_path / "data/models/tiny")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    shutil.copy(DVC_YAML, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpress.planning.measure_machine", lambda _=None: machine)
    return tmp_path


def write_tiny(folder: Path, hidden: int = 64) -> Path:
    sizes = {"hidden_size": hidden, "intermediate_size": 176, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return write_config(folder, **sizes, **heads)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], STAGES),
        (["three-bit"], "calibrate tiny, compress three-bit, reference tiny, evaluate three-bit"),
        (
            ["clusters-sums"],
            "calibrate tiny, compress clusters, finetune clusters-tuned, train clusters-sums, "
            "reference tiny, evaluate_trained clusters-sums",
        ),
        (["adapter"], "train adapter, reference tiny, evaluate_trained adapter"),
        (
            ["signs"],
            "train_task tiny-sums, extract_delta tiny-sums, calibrate tiny-sums, "
            "compress_delta signs, reference tiny-sums, evaluate_delta signs",
        ),
    ],
    ids=["all", "run", "training", "adapter", "delta"],
)
def test_rows_of_runs_and_of_what_they_are_made_from(
    names: list[str], expected: str, project: Path, machine: Machine
) -> None:
    made = plan_project(PARAMS, machine, names=names, root=project)

    assert ", ".join(f"{row.stage} {row.name}" for row in made.rows) == expected
    assert made.fits
    needs = [row.need for row in made.rows if row.need and not row.problems]
    assert len(needs) == len(made.rows)
    assert made.memory_bytes == max(need.host_bytes for need in needs)
    assert made.disk_bytes == sum(need.artifact_bytes for need in needs)
    assert made.seconds == pytest.approx(sum(row.time.seconds for row in made.rows if row.time))


def test_other_params_are_planned_in_the_project(project: Path) -> None:
    (project / "examples").mkdir()
    (project / "params.yaml").rename(project / "examples/all.yaml")
    assert run("--params", "examples/all.yaml", "three-bit").exit_code == 0


def test_a_project_is_planned_beside_its_dvc_yaml(project: Path, machine: Machine) -> None:
    (project / "dvc.yaml").unlink()
    with pytest.raises(ConfigError, match=r"dvc\.yaml"):
        plan_project(PARAMS, machine, root=project)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [(["clusers"], {"bits": 5.0}, "'clusters'"), ([], {"bits": 0.2}, r"clusters: bits=0\.2")],
    ids=["unknown run", "budget"],
)
def test_mistakes_name_the_run(
    names: list[str], settings: dict[str, Any], message: str, project: Path, machine: Machine
) -> None:
    clusters = {**PARAMS["runs"]["clusters"], "settings": settings}
    params = {**PARAMS, "runs": {**PARAMS["runs"], "clusters": clusters}}
    with pytest.raises(ConfigError, match=message):
        plan_project(params, machine, names=names, root=project)


def test_a_local_model_is_planned_before_it_is_fetched_others_are_not_guessed(
    tmp_path: Path, machine: Machine
) -> None:
    source = {"path": str(write_tiny(tmp_path / "elsewhere")), "license": "MIT"}

    shutil.copy(DVC_YAML, tmp_path)
    local = plan_project({**PARAMS, "models": {"tiny": source}}, machine, root=tmp_path)
    unknown = plan_project(PARAMS, machine, root=tmp_path)

    assert all(row.need and not row.problems for row in local.rows)
    assert not any(row.need for row in unknown.rows)
    (told,) = {problem for row in unknown.rows for problem in row.problems}
    assert "fetch_model.py tiny" in told
    assert unknown.fits


def test_what_a_large_model_lacks_is_said(
    tmp_path: Path, machine: Machine, llama_70b: ModelShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpress.planning.plan.read_shapes", lambda _: llama_70b)
    source = {"path": str(write_tiny(tmp_path / "elsewhere")), "license": "MIT"}
    shutil.copy(DVC_YAML, tmp_path)
    made = plan_project({**PARAMS, "models": {"tiny": source}}, machine, root=tmp_path)

    rows = {f"{row.stage} {row.name}": row for row in made.rows}
    assert not rows["compress three-bit"].problems
    assert "`length`" in rows["evaluate three-bit"].problems[0]
    assert "`batch_size`" in rows["train_task tiny-sums"].problems[0]


def test_artifacts_that_are_there_need_no_disk(project: Path, machine: Machine) -> None:
    before = plan_project(PARAMS, machine, names=["three-bit"], root=project)
    (project / "data/compressed/three-bit").mkdir(parents=True)
    after = plan_project(PARAMS, machine, names=["three-bit"], root=project)

    assert [row.present for row in after.rows] == [False, True, False, False]
    need = before.rows[1].need
    assert need is not None
    assert before.disk_missing_bytes - after.disk_missing_bytes == need.artifact_bytes
    assert after.disk_bytes == before.disk_bytes


@pytest.mark.parametrize(
    ("poor", "word"),
    [
        ({"memory_available_bytes": 1000}, "memory: "),
        ({"device_memory_free_bytes": 1000, "gpu": "a GPU"}, "GPU memory: "),
    ],
    ids=["memory", "GPU"],
)
def test_what_does_not_fit_is_said(
    poor: dict[str, Any], word: str, project: Path, machine: Machine
) -> None:
    made = plan_project(PARAMS, replace(machine, **poor), names=["three-bit"], root=project)

    assert not made.fits
    assert made.rows[0].problems[0].startswith(word)


def test_artifacts_that_fit_one_by_one_may_not_fit_together(
    project: Path, machine: Machine
) -> None:
    needs = [row.need for row in plan_project(PARAMS, machine, root=project).rows if row.need]
    largest = max(need.artifact_bytes for need in needs)

    made = plan_project(PARAMS, replace(machine, disk_free_bytes=largest), root=project)

    assert not any(row.problems for row in made.rows)
    assert not made.fits
    assert made.problems[0].startswith("disk: ")


def test_a_gpu_takes_the_work_and_the_host_the_rest(project: Path, machine: Machine) -> None:
    gpu = replace(machine, gpu="a GPU", device_memory_free_bytes=80 * 10**9)

    on_gpu, on_cpu = (plan_project(PARAMS, place, root=project) for place in (gpu, machine))

    for there, here in zip(on_gpu.rows, on_cpu.rows, strict=True):
        assert there.need is not None
        assert here.need is not None
        assert here.need.device_bytes == 0
        assert there.need.device_bytes > 0 or there.stage == "extract_delta"
        assert there.need.host_bytes + there.need.device_bytes == here.need.host_bytes


def test_seconds_are_those_of_the_records_scaled_by_work(project: Path, machine: Machine) -> None:
    known = next(r for r in read_records() if (r.stage, r.method) == ("compress", "rtn"))
    here = replace(machine, processor=known.processor)

    _, row, *_ = plan_project(PARAMS, here, names=["three-bit"], root=project).rows

    assert row.need is not None
    assert row.time is not None
    assert row.time.seconds == pytest.approx(known.seconds * row.need.work / known.work)
    assert row.time.machine == known.processor


def test_a_delta_that_is_there_tells_what_else_it_holds(project: Path, machine: Machine) -> None:
    def planned() -> list[int]:
        rows = plan_project(PARAMS, machine, names=["signs"], root=project).rows
        return [r.need.artifact_bytes for r in rows if r.need and "delta" in r.stage]

    alone = planned()
    (project / "data/deltas/tiny-sums").mkdir(parents=True)
    header = {"exact": {"model.norm.weight": 64}}
    (project / "data/deltas/tiny-sums/delta.json").write_text(json.dumps(header))

    assert all(now > before for now, before in zip(planned()[:2], alone[:2], strict=True))


@pytest.mark.usefixtures("project")
def test_json_has_every_number_with_its_unit() -> None:
    made = json.loads(run("--json").stdout)

    assert set(made["rows"][0]) == {"stage", "name", "need", "time", "present", "problems"}
    needs = {"work", "artifact_bytes", "device_bytes", "host_bytes", "by"}
    assert set(made["rows"][0]["need"]) == needs
    assert set(made) >= {"memory_bytes", "disk_bytes", "disk_missing_bytes", "seconds"}
    assert made["machine"]["memory_available_bytes"] == 16 * 10**9


def test_the_table_and_its_exit_code(
    project: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = run("three-bit")
    poor = replace(machine, memory_available_bytes=1000)
    monkeypatch.setattr("llmpress.planning.measure_machine", lambda _=None: poor)
    too_large = run("three-bit")
    (project / "data/models/tiny/config.json").unlink()
    unfetched = run("three-bit")

    assert (fits.exit_code, too_large.exit_code, unfetched.exit_code) == (0, 3, 0)
    for word in ("compress", "three-bit", "calibrate", "available", "yes", "by records of"):
        assert word in fits.stdout
    assert "NO" in too_large.stdout
    assert "`windows`" in " ".join(too_large.stdout.split())
    assert "fetch the model first" in unfetched.stdout


def test_one_compression_without_a_params_file(project: Path) -> None:
    (project / "params.yaml").unlink()
    config = ("--model", str(project / "data/models/tiny/config.json"), "--method", "cluscomp")

    (row,), (lower,) = (
        json.loads(run(*config, *bits, "--json").stdout)["rows"]
        for bits in (("--set", "bits=5.0"), ("--bits", "4"))
    )

    assert (row["stage"], row["name"], row["problems"]) == ("compress", "tiny", [])
    assert lower["need"]["artifact_bytes"] < row["need"]["artifact_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {} --method rnt", "'rtn'"),
        ("--model {} --method rtn --set num_bit=3", "'num_bits'"),
        ("--model {} --method rtn three-bit", "leave the names"),
        ("--model {}", "need a --method"),
        ("--set bits=3", "need a --method"),
        ("--method rtn", "needs a --model"),
        ("--model nowhere --method rtn", "no model here"),
    ],
    ids=["method", "setting", "names", "model alone", "no method", "no model", "nowhere"],
)
def test_mistakes_on_the_command_line(arguments: str, message: str, project: Path) -> None:
    result = run(*arguments.format(project / "data/models/tiny").split())

    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError | ArtifactError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.2, "6.2 s"), (150, "2.5 min"), (14400, "4 h"), (432000, "5 days"), (0.5, "0.5 s")],
    ids=str,
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_this_machine_is_measured(tmp_path: Path) -> None:
    measured = measure_machine(tmp_path)
    assert measured.memory_available_bytes > 0
    assert measured.disk_free_bytes > 0
    assert measured.processor
