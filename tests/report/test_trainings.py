"""The report's comparison of what was finetuned end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_project import Project, make_details, make_layers, make_metrics

from llmpress.evaluation.metrics import Details
from llmpress.report.html import write_report
from llmpress.report.tables import layers_frame, read_results, summary_frame
from llmpress.report.trainings import training_tables

TASK = "arithmetic"
TRAININGS: dict[str, dict[str, Any]] = {
    "lora-sums": {"start": "models/smollm2", "trains": "lora", "task": TASK},
    "codes-sums": {"start": "compressed/cluscomp-3bit", "trains": "compressed", "task": TASK},
    "codes-text": {
        "start": "finetuned/cluscomp-3bit-tuned",
        "trains": "compressed",
        "corpora": ["wikipedia", "code"],
    },
}


@pytest.fixture
def trained(project: Project) -> Project:
    """The project with three trainings; the one on text kept its start."""
    params = project.params
    params["trainings"] = {n: {**entry, "model": "smollm2"} for n, entry in TRAININGS.items()}
    params["finetuned_models"] = {"smollm2-arithmetic": {"base": "smollm2", "task": TASK}}
    for index, (name, entry) in enumerate(TRAININGS.items()):
        method = "lora" if entry["trains"] == "lora" else "cluscomp"
        layers = None if method == "lora" else make_layers(name, method, 3.0, 0.2, 2)
        details = make_details(name, "trained", method, "smollm2", None, layers)
        details["training"] = {
            "trains": entry["trains"],
            "settings": {"steps": 120, "batch_size": 8},
            "trainable_parameters": 614_400,
            "model_parameters": 134_515_008,
            "trainable_share": 614_400 / 134_515_008,
            "loss_before": 2.5,
            "loss_after": 2.5 if name == "codes-text" else 0.25,
            "best_step": 0 if name == "codes-text" else 120,
            "held_out": [[0, 2.5], [120, 2.75 if name == "codes-text" else 0.25]],
        }
        Details.model_validate(details)
        metrics = make_metrics(name, 3.0 + index, 0.2, "compressed")
        metrics["quality"]["tasks"][TASK] = {"accuracy": 0.375, "stderr": 0.06, "num_items": 200}
        for folder, value in ((project.metrics, metrics), (project.details, details)):
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return project


def test_a_task_is_compared_with_full_finetuning_and_every_start(trained: Project) -> None:
    results = read_results(trained.metrics, trained.details, trained.params)
    task, _ = training_tables(results, trained.params)
    assert task.title == "Trained on arithmetic"
    rows = dict(task.rows)
    assert list(rows) == ["smollm2-arithmetic", "lora-sums", "codes-sums"]
    assert {len(cells) for cells in rows.values()} == {len(task.headings)}
    cells = dict(zip(task.headings, rows["codes-sums"], strict=True))
    assert cells["arithmetic after, %"] == "37.5 ± 6.0"
    assert cells["Trained"] == "compressed"
    assert cells["Trainable parameters"] == "614,400"
    assert cells["% of the model"] == "0.46"
    assert cells["Steps × batch"] == "120 × 8"
    assert cells["Held-out loss, nats"] == "2.500 → 0.2500"
    assert cells["Bits per weight"] == "4.00"
    full = dict(zip(task.headings, rows["smollm2-arithmetic"], strict=True))
    assert full["Trained"] == "all linears"
    assert full["Held-out loss, nats"] == "—"


def test_recovery_shows_perplexity_before_and_after(trained: Project) -> None:
    results = read_results(trained.metrics, trained.details, trained.params)
    _, text = training_tables(results, trained.params)
    [(name, cells)] = text.rows
    assert name == "codes-text"
    start = trained.read("metrics", "cluscomp-3bit-tuned")["quality"]["perplexity"]
    after = trained.read("metrics", "codes-text")["quality"]["perplexity"]
    expected = f"{start['wikipedia']:.2f} → {after['wikipedia']:.2f}"
    assert (
        dict(zip(text.headings, cells, strict=True))["Perplexity wikipedia, before → after"]
        == expected
    )
    assert "2.500 → not lower, start kept" in cells


def test_the_page_shows_them_and_says_what_was_undone(trained: Project, tmp_path: Path) -> None:
    results = read_results(trained.metrics, trained.details, trained.params)
    write_report(results, trained.params, tmp_path / "r.html", tmp_path / "s.csv")
    page = (tmp_path / "r.html").read_text()
    assert '<section id="training"' in page
    assert "end-to-end finetuning undone" in page
    frame = summary_frame(results).set_index("name")
    assert list(frame.loc[list(TRAININGS), "kind"]) == ["trained", "trained", "recovered"]
    assert frame.loc["codes-sums", "tuned_from"] == "cluscomp-3bit"
    assert not set(TRAININGS) & set(layers_frame(results)["run"])


def test_without_trainings_there_is_no_section(project: Project, tmp_path: Path) -> None:
    results = read_results(project.metrics, project.details, project.params)
    assert training_tables(results, project.params) == []
    write_report(results, project.params, tmp_path / "r.html", tmp_path / "s.csv")
    assert '<section id="training"' not in (tmp_path / "r.html").read_text()
