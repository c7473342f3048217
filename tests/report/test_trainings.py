"""What was finetuned end to end, beside what it started from and full finetuning."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_project import Project, make_details, make_layers, make_metrics

from llmpress.evaluation.metrics import Details
from llmpress.report.groups import find_groups
from llmpress.report.html import write_report
from llmpress.report.tables import layers_frame, read_results, summary_frame

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
        metrics = make_metrics(name, 3.0 + index, 0.2, "compressed")
        metrics["quality"]["tasks"][TASK] = {"accuracy": 0.375, "stderr": 0.06, "num_items": 200}
        details = make_details(name, "trained", method, "smollm2", None, layers, metrics)
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
        for folder, value in ((project.metrics, metrics), (project.details, details)):
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return project


def test_a_task_is_a_group_of_its_own_beside_full_finetuning(trained: Project) -> None:
    results = read_results(trained.metrics, trained.details, trained.params)
    groups = {group.what: group for group in find_groups(summary_frame(results))}
    sums = groups["Trained on a task"]
    assert [run["name"] for run in sums.runs] == ["lora-sums", "codes-sums"]
    assert [model["name"] for model in sums.references] == ["smollm2", "smollm2-arithmetic"]
    assert "trainable_parameters" in sums.columns
    assert "codes-text" in [run["name"] for run in groups["Weights"].runs]


def test_the_page_shows_what_was_trained_and_undone(trained: Project, tmp_path: Path) -> None:
    results = read_results(trained.metrics, trained.details, trained.params)
    write_report(results, trained.params, tmp_path / "r.html", tmp_path / "s.csv")
    page = (tmp_path / "r.html").read_text()
    assert "end-to-end finetuning undone" in page
    part = page[page.index('id="run-codes-sums"') :].partition("</details>\n  <details id=")[0]
    assert "Difference from cluscomp-3bit" in part
    assert "614,400" in part
    assert "0.46" in part
    assert "loss_before" in part
    frame = summary_frame(results).set_index("name")
    assert list(frame.loc[list(TRAININGS), "kind"]) == ["trained", "trained", "recovered"]
    assert frame.loc["codes-sums", "tuned_from"] == "cluscomp-3bit"
    assert not set(TRAININGS) & set(layers_frame(results)["run"])
