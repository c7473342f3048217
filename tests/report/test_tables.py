import json
from pathlib import Path

import pandas as pd
import pytest
from report_project import CORPORA, DELTA_RUNS, TASKS, WEIGHT_RUNS, Project

from llmpress.core.errors import ArtifactError
from llmpress.core.kinds import KINDS, Kind
from llmpress.evaluation.metrics import Details, Metrics
from llmpress.report.html import write_report
from llmpress.report.tables import (
    blocks_frame,
    layers_frame,
    read_results,
    split_layer_name,
    summary_frame,
)

ALL = ["smollm2", "smollm2-arithmetic", *WEIGHT_RUNS, "cluscomp-3bit-tuned", *DELTA_RUNS]


def summary_of(project: Project) -> pd.DataFrame:
    return summary_frame(read_results(project.metrics, project.details, project.params)).set_index(
        "name"
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_run_of_each_kind_is_a_row_and_a_part_of_the_page(
    project: Project, kind: Kind, tmp_path: Path
) -> None:
    name = next(iter(WEIGHT_RUNS))
    project.edit("details", name, lambda details: details.update(kind=kind.name))
    page, table = tmp_path / "report.html", tmp_path / "report.csv"
    write_report(read_results(project.metrics, project.details), {}, page, table)
    assert pd.read_csv(table).set_index("name").loc[name, "kind"] == kind.name
    assert kind.label in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_fixtures_are_what_evaluation_writes(project: Project, name: str) -> None:
    Metrics.model_validate(project.read("metrics", name))
    Details.model_validate(project.read("details", name))


@pytest.mark.parametrize("name", ALL)
def test_summary_holds_the_numbers_of_the_metrics_file(project: Project, name: str) -> None:
    row, metrics = summary_of(project).loc[name], project.read("metrics", name)
    for section in ("size", "cost"):
        for key, value in metrics[section].items():
            assert row[key] == value, key
    quality = metrics["quality"]
    for corpus in CORPORA:
        assert row[f"perplexity_{corpus}"] == quality["perplexity"][corpus]
        assert row[f"kl_{corpus}"] == quality["kl_divergence_nats"][corpus]
        assert row[f"top1_agreement_{corpus}"] == quality["top1_agreement"][corpus]
        assert row[f"stderr_perplexity_{corpus}"] == quality["perplexity_stderr"][corpus]
        assert row[f"stderr_kl_{corpus}"] == quality["kl_divergence_stderr_nats"][corpus]
    for task in TASKS:
        for key in ("accuracy", "stderr", "num_items"):
            assert row[f"{key}_{task}"] == quality["tasks"][task][key]


def test_kinds_methods_and_comparisons(project: Project) -> None:
    summary = summary_of(project)
    assert list(summary.index) == ALL
    tuned, delta = summary.loc["cluscomp-3bit-tuned"], summary.loc["delta-come-1bit"]
    assert (tuned["kind"], tuned["tuned_from"]) == ("finetuned", "cluscomp-3bit")
    assert (delta["kind"], delta["original"], delta["base"]) == (
        "delta",
        "smollm2-arithmetic",
        "smollm2",
    )
    assert summary.loc["gptq-3bit", "method"] == "gptq"
    assert pd.isna(summary.loc["smollm2", "original"])


def test_recovery_is_the_ratio_of_the_mean_accuracies(project: Project) -> None:
    for name, correct in (("smollm2", 0.8), ("gptq-3bit", 0.6)):
        project.edit(
            "metrics",
            name,
            lambda m, c=correct: [t.update(accuracy=c) for t in m["quality"]["tasks"].values()],
        )
    summary = summary_of(project)
    assert summary.loc["gptq-3bit", "recovery"] == pytest.approx(0.75)
    assert pd.isna(summary.loc["smollm2", "recovery"])


@pytest.mark.parametrize("change", ["a task less", "fewer items"])
def test_no_recovery_when_the_tasks_differ(project: Project, change: str) -> None:
    def edit(metrics: dict) -> None:
        tasks = metrics["quality"]["tasks"]
        if change == "a task less":
            del tasks["piqa"]
        else:
            tasks["piqa"]["num_items"] = 10

    project.edit("metrics", "gptq-3bit", edit)
    recovery = summary_of(project)["recovery"]
    assert pd.isna(recovery["gptq-3bit"])
    assert pd.notna(recovery["rtn-4bit"])


def test_missing_runs_are_named_with_a_reason(project: Project) -> None:
    (project.metrics / "gptq-3bit.json").unlink()
    results = read_results(project.metrics, project.details, project.params)
    assert list(results.missing) == ["gptq-3bit"]
    assert "gptq-3bit.json" in results.missing["gptq-3bit"]
    assert results.get("gptq-3bit") is None


def test_results_that_params_do_not_name_are_left_out_aloud(project: Project) -> None:
    del project.params["runs"]["gptq-3bit"]
    results = read_results(project.metrics, project.details, project.params)
    assert results.get("gptq-3bit") is None
    assert results.missing == {}
    assert any("gptq-3bit" in remark for remark in results.remarks)


def test_a_result_without_details_keeps_its_numbers(project: Project) -> None:
    (project.details / "delta-come-1bit.json").unlink()
    results = read_results(project.metrics, project.details, project.params)
    row = summary_frame(results).set_index("name").loc["delta-come-1bit"]
    assert (row["original"], row["base"]) == ("smollm2-arithmetic", "smollm2")
    assert row["recovery"] > 0
    assert any("delta-come-1bit" in remark for remark in results.remarks)


def test_no_results_at_all(project: Project, tmp_path: Path) -> None:
    results = read_results(tmp_path / "none", tmp_path / "none", project.params)
    assert list(results.missing) == ALL
    assert summary_frame(results).empty
    assert layers_frame(results).empty
    assert blocks_frame(results).empty


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_file_is_named(project: Project, content: str) -> None:
    (project.metrics / "rtn-4bit.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"rtn-4bit\.json"):
        read_results(project.metrics, project.details, project.params)


def test_layers_and_blocks(project: Project) -> None:
    results = read_results(project.metrics, project.details, project.params)
    layers, blocks = layers_frame(results), blocks_frame(results)
    expected = project.read("details", "svd-20pct")["layers"]["layers"]
    rows = layers[layers["run"] == "svd-20pct"]
    assert list(rows["name"]) == [layer["name"] for layer in expected]
    assert list(rows["relative_output_error"]) == [x["relative_output_error"] for x in expected]
    assert rows.iloc[8][["block", "module"]].to_list() == [1, "self_attn.k_proj"]
    assert list(blocks["loss_after"]) == [
        block["loss_after"]
        for block in project.read("details", "cluscomp-3bit-tuned")["layers"]["blocks"]
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj", (12, "mlp.up_proj")),
        ("model.layers.0.mlp.experts.7.w1", (0, "mlp.experts.7.w1")),
        ("lm_head", (-1, "lm_head")),
    ],
)
def test_split_layer_name(name: str, expected: tuple[int, str]) -> None:
    assert split_layer_name(name) == expected


def test_summary_csv_is_the_frame(project: Project, tmp_path: Path) -> None:
    results = read_results(project.metrics, project.details, project.params)
    write_report(results, project.params, tmp_path / "a" / "r.html", tmp_path / "a" / "s.csv")
    table = pd.read_csv(tmp_path / "a" / "s.csv").set_index("name")
    assert list(table.index) == ALL
    for name in ALL:
        metrics = json.loads((project.metrics / f"{name}.json").read_text())
        assert table.loc[name, "bits_per_weight"] == metrics["size"]["bits_per_weight"]
        assert table.loc[name, "model_bytes"] == metrics["size"]["model_bytes"]
    assert table["model_bytes"].dtype == "int64"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["r.html", "s.csv"]
