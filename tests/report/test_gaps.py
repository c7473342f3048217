"""Why results are missing, on folders as the pipeline leaves them."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from report_project import Project, make_project

from dvc_bridge import Bridge
from llmpress.pipeline.jobs import read_jobs
from llmpress.report.gaps import find_gaps, last_error
from llmpress.report.html import write_report
from llmpress.report.skipped import skipped
from llmpress.report.tables import blocks_frame, layers_frame, read_results

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "dvc.yaml"
PARAMS = yaml.safe_load((ROOT / "examples/all-methods.yaml").read_text(encoding="utf-8"))
RUN, TUNED, DELTA = (next(iter(PARAMS[key])) for key in ("runs", "finetunes", "delta_runs"))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The project's own dvc.yaml in a folder where every stage has finished."""
    root = tmp_path / "pipeline"
    for job in read_jobs(PIPELINE, PARAMS):
        for output in job.outputs:
            (root / output).mkdir(parents=True, exist_ok=True)
    return shutil.copy(PIPELINE, root / "dvc.yaml")


def causes(pipeline: Path, name: str) -> list[tuple[str, str]]:
    logs = pipeline.parent / "logs"
    rows = find_gaps({name: "no metrics"}, PARAMS, pipeline, logs).rows
    assert {row[0] for row in rows} == {name}
    return [(job, re.findall(r"Missing: (.*?)\. ", f"{why} ")[0]) for _, job, why in rows]


def remove(pipeline: Path, *paths: str) -> None:
    for path in paths:
        (pipeline.parent / path).rmdir()


def test_every_name_has_an_evaluation_among_the_stages() -> None:
    made = {output for job in read_jobs(PIPELINE, PARAMS) for output in job.outputs}
    names = [*PARAMS["evaluation"]["models"], *PARAMS["runs"], *PARAMS["finetunes"],
             *PARAMS["delta_runs"]]  # fmt: skip
    assert {f"results/metrics/{name}.json" for name in names} <= made


def test_logs_lie_where_the_rules_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    bridge = Bridge(check_staleness=False)
    for stage in {job.stage for job in read_jobs(PIPELINE, PARAMS) if job.key}:
        assert bridge.label(stage) == f"{stage}/{{name}}"


def test_an_evaluation_alone_is_missing(pipeline: Path) -> None:
    remove(pipeline, f"results/metrics/{RUN}.json")
    assert causes(pipeline, RUN) == [(f"evaluate {RUN}", f"results/metrics/{RUN}.json")]


def test_an_absent_artifact_is_the_cause(pipeline: Path) -> None:
    remove(pipeline, f"results/metrics/{RUN}.json", f"data/compressed/{RUN}")
    assert causes(pipeline, RUN) == [(f"compress {RUN}", f"data/compressed/{RUN}")]


def test_the_first_of_a_chain_is_the_cause(pipeline: Path) -> None:
    run, model = (PARAMS["finetunes"][TUNED][key] for key in ("run", "model"))
    remove(pipeline, f"results/metrics/{TUNED}.json", f"data/finetuned/{TUNED}")
    assert causes(pipeline, TUNED) == [(f"finetune {TUNED}", f"data/finetuned/{TUNED}")]
    remove(pipeline, f"data/compressed/{run}")
    assert causes(pipeline, TUNED) == [(f"compress {run}", f"data/compressed/{run}")]
    remove(pipeline, f"data/calibration/{model}", "data/corpora/code", "data/models/smollm2")
    assert causes(pipeline, TUNED) == [
        ("fetch_model smollm2", "data/models/smollm2"),
        ("fetch_corpus code", "data/corpora/code"),
    ]


def test_a_delta_waits_for_the_delta(pipeline: Path) -> None:
    finetuned = PARAMS["delta_runs"][DELTA]["finetuned"]
    remove(
        pipeline,
        f"results/metrics/{DELTA}.json",
        f"data/compressed/{DELTA}",
        f"data/deltas/{finetuned}",
    )
    assert causes(pipeline, DELTA) == [(f"extract_delta {finetuned}", f"data/deltas/{finetuned}")]


@pytest.mark.parametrize(
    ("log", "error", "said"),
    [
        ("blocks: 3%\rerror: NaN in layer 3\nERROR: failed to reproduce\n", "error: NaN in layer 3",
         "ends with this error:"),
        ("blocks: 3%\rblocks: 7%", "", "holds no error: the stage is running or was stopped."),
        (None, "", "the stage has not started, or ran outside of Snakemake."),
    ],
    ids=["failed", "running", "not started"],
)  # fmt: skip
def test_the_log_is_told(pipeline: Path, log: str | None, error: str, said: str) -> None:
    remove(pipeline, f"results/metrics/{RUN}.json", f"data/compressed/{RUN}")
    path = pipeline.parent / "logs" / "compress" / f"{RUN}.log"
    path.parent.mkdir(parents=True)
    if log is not None:
        path.write_bytes(log.encode())
    found = find_gaps({RUN: "no metrics"}, PARAMS, pipeline, pipeline.parent / "logs")
    ((_, _, why),) = found.rows
    assert why.endswith(f"{said} {error}".strip())
    assert str(path) in why


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("error: first\nerror: last\nmore\n", "error: last"),
        ("blocks: 3%\rblocks: 7%\rerror: after a progress bar\r", "error: after a progress bar"),
        ("Traceback\n  File x\nValueError: bad\nERROR: failed\n", "ValueError: bad"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of "
         "memory"),
        ("Killed\nERROR: failed to run\n", "Killed"),
        ("ERROR: failed to reproduce 'x': exited with -9\n", "ERROR: failed to reproduce 'x': "
         "exited with -9"),
        ("error: " + "x" * 999, "error: " + "x" * 393 + "…"),
        ("no error here: nothing\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_error_of_a_log(log: str, error: str) -> None:
    assert last_error(log) == error


@pytest.mark.parametrize("content", [None, "stages: {", "[]", "stages:\n  a:\n    cmd: x\n"])
def test_without_a_readable_pipeline_less_is_said(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "dvc.yaml"
    if content is not None:
        path.write_text(content)
    found = find_gaps({RUN: "There is no file."}, PARAMS, path, tmp_path / "logs")
    assert found.rows == [(RUN, "unknown", "There is no file.")]


def test_complete_results_give_the_same_report_whatever_lies_around(
    project: Project, pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "logs" / "compress").mkdir(parents=True)
    (tmp_path / "logs" / "compress" / "rtn-4bit.log").write_text("error: of another time\n")
    results = read_results(project.metrics, project.details, project.params)
    write_report(results, project.params, tmp_path / "a.html", tmp_path / "a.csv")
    write_report(
        results,
        project.params,
        tmp_path / "b.html",
        tmp_path / "b.csv",
        pipeline=pipeline,
        logs=tmp_path / "logs",
    )
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_report_shows_stage_and_error(project: Project, tmp_path: Path) -> None:
    attack = "error: <script>alert(1)</script> in logs"
    for folder in (project.metrics, project.details):
        (folder / "gptq-3bit.json").unlink()
    (tmp_path / "logs" / "compress").mkdir(parents=True)
    (tmp_path / "logs" / "compress" / "gptq-3bit.log").write_text(attack)
    shutil.copy(PIPELINE, tmp_path / "dvc.yaml")
    results = read_results(project.metrics, project.details, project.params)
    for name in ("smollm2",):
        (tmp_path / "data" / "models" / name).mkdir(parents=True)
        (tmp_path / "data" / "calibration" / name).mkdir(parents=True)
    for kind in ("corpora", "tasks"):
        for name in project.params[kind]:
            (tmp_path / "data" / kind / name).mkdir(parents=True)
    write_report(
        results,
        project.params,
        tmp_path / "r.html",
        tmp_path / "s.csv",
        pipeline=tmp_path / "dvc.yaml",
        logs=tmp_path / "logs",
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="missing"') :].split("</section>")[0]
    assert "<td>compress gptq-3bit</td>" in section
    assert "Missing: data/compressed/gptq-3bit." in section
    assert "error: &lt;script&gt;alert(1)&lt;/script&gt; in logs</td>" in section
    assert "1 of 12 are missing:</strong>\n    gptq-3bit." in page


def skipped_of(project: Project) -> list[tuple[str, str, str]]:
    results = read_results(project.metrics, project.details, project.params)
    found = skipped(results, layers_frame(results), blocks_frame(results), project.params)
    return [tuple(item) for item in found.rows]


def test_a_block_whose_finetuning_was_undone_is_said(tmp_path: Path) -> None:
    project = make_project(tmp_path / "results")
    (item,) = skipped_of(project)
    assert item[:2] == ("cluscomp-3bit-tuned", "finetuning of 1 of 4 blocks undone: 1")


def test_dense_layers_and_unmeasured_numbers_are_said(tmp_path: Path) -> None:
    project = make_project(tmp_path / "results")

    def leave_dense(details: dict) -> None:
        for layer in details["layers"]["layers"][:6]:
            layer.update(kind="dense", settings={}, bits_per_weight=16.0)

    def unmeasure(details: dict) -> None:
        for layer in details["layers"]["layers"]:
            layer["relative_output_error"] = None
        details["layers"].pop("blocks", None)

    project.edit("details", "lillama-20pct", leave_dense)
    project.edit("details", "rtn-4bit", unmeasure)
    project.edit("details", "cluscomp-3bit-tuned", unmeasure)
    project.edit("metrics", "bitdelta", lambda m: m["quality"]["tasks"].pop("piqa"))
    project.params["evaluation"]["tasks"] = {"arc-easy": 64, "piqa": 64}
    dense, plain, tuned, task = skipped_of(project)
    assert dense[:2] == (
        "lillama-20pct",
        "6 of 28 layers left dense: model.layers.0.self_attn.q_proj, "
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, "
        "model.layers.0.self_attn.o_proj and 2 more",
    )
    assert "The plan of lillama" in dense[2]
    assert plain == (
        "rtn-4bit",
        "no relative output error of its layers",
        "It was compressed without calibration statistics.",
    )
    assert tuned[2].startswith("Not measured again after finetuning: see cluscomp-3bit ")
    assert task[:2] == ("bitdelta", "no number for task piqa")
