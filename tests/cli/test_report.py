"""``llmpress report`` on folders of metrics, good and bad."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import llmpress

RUN: dict[str, Any] = {
    "quality": {
        "perplexity": {"text": 20.0},
        "kl_divergence_nats": {"text": 0.25},
        "top1_agreement": {"text": 0.75},
        "perplexity_stderr": {"text": 2.0},
        "kl_divergence_stderr_nats": {"text": 0.02},
        "top1_agreement_stderr": {"text": 0.01},
        "tasks": {},
    },
    "size": {
        "bits_per_weight": 3.25,
        "compressed_weights": 1000,
        "stored_bits": 3250,
        "model_weights": 2000,
        "model_bytes": 12_500_000,
        "ratio": 4.0,
    },
    "cost": {
        "compress_seconds": 3.0,
        "compress_peak_memory_bytes": 1_000_000,
        "finetune_seconds": 0.0,
        "finetune_peak_memory_bytes": 0,
    },
}


def folder(tmp_path: Path, **contents: Any) -> Path:
    path = tmp_path / "metrics"
    path.mkdir()
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_one_run_is_a_page_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = llmpress("report", folder(tmp_path, alone=RUN), "-o", out)
    assert (done.code, done.err) == (0, "")
    page = out.read_text()
    assert "No other run fits." in page
    assert "alone has no details file" in page
    table = (tmp_path / "page.csv").read_text()
    assert "\nalone,measured,on the Pareto front,,12.5,compressed," in table


def test_an_existing_page_stays(tmp_path: Path) -> None:
    out, metrics = tmp_path / "page.html", folder(tmp_path, alone=RUN)
    out.write_text("mine")
    done = llmpress("report", metrics, "-o", out)
    assert (done.code, out.read_text()) == (1, "mine")
    assert str(out) in done.err
    assert llmpress("report", metrics, "-o", out, "--force").code == 0


@pytest.mark.parametrize(
    ("contents", "named"),
    [
        ({}, "metrics"),
        ({"other": {"name": "a page of something else"}}, "other.json"),
        ({"list": [1]}, "list.json"),
        ({"wrong": RUN | {"size": RUN["size"] | {"model_bytes": "12 MB"}}}, "wrong.json"),
        ({"wrong": RUN | {"quality": {"perplexity": 3}}}, "wrong.json"),
    ],
    ids=["none", "no metrics", "a list", "text for a number", "a number for a table"],
)
def test_bad_folders_are_one_line(contents: Any, named: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = llmpress("report", folder(tmp_path, **contents), "-o", out)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert named in done.err
    assert not out.exists()


def test_a_params_file_names_what_is_missing(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(
        "evaluation: {models: []}\nruns:\n  alone: {model: m, method: rtn}\n"
        "  failed: {model: m, method: rtn}\n"
    )
    out = tmp_path / "page.html"
    done = llmpress("report", folder(tmp_path, alone=RUN), "--params", params, "-o", out)
    assert done.code == 0
    assert "1 of 2 are missing" in out.read_text()
    assert "\nfailed,missing," in (tmp_path / "page.csv").read_text()


def test_no_run_finished_is_one_line(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("runs:\n  failed: {model: m, method: rtn}\n")
    done = llmpress("report", folder(tmp_path), "--params", params, "-o", tmp_path / "p.html")
    assert done.code == 1
    assert "metrics" in done.err
