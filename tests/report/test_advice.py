"""Which run is advised: only what the same windows support."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_project import Project

from llmpress.report.advice import Advice, advise
from llmpress.report.comparison import Pairs
from llmpress.report.groups import find_groups
from llmpress.report.html import rows_of_runs, write_report
from llmpress.report.tables import read_results, summary_frame

MB = 1_000_000


def add_run(project: Project, name: str, size: int, divergences: list[float], **more: Any) -> None:
    """Add a run of that many bytes with these divergences of its windows of both corpora."""
    project.params["runs"][name] = {"model": "smollm2", "method": "rtn"}
    mean = sum(divergences) / len(divergences)
    metrics, details = (project.read(f, "rtn-4bit") for f in ("metrics", "details"))
    metrics["size"]["model_bytes"] = size
    for key in ("kl_divergence_nats", "perplexity"):
        metrics["quality"][key] = dict.fromkeys(("wikipedia", "code"), mean) | more.get(key, {})
    details["windows"] = {
        corpus: {
            "loss_nats": divergences,
            "kl_divergence_nats": divergences,
            "top1_agreement": [0.5] * len(divergences),
        }
        for corpus in ("wikipedia", "code")
    }
    details["evaluation"] |= more.get("evaluation", {})
    for folder, value in (("metrics", metrics), ("details", details)):
        (project.root / folder / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture
def bare(project: Project) -> Project:
    """The models alone."""
    project.params.update(runs={}, finetunes={}, delta_runs={})
    return project


def advice_of(project: Project) -> list[Advice]:
    results = read_results(project.metrics, project.details, project.params)
    group = next(g for g in find_groups(summary_frame(results)) if g.what == "Weights")
    return advise(group, Pairs(results))


def names(advice: Advice) -> list[str]:
    return [str(run["name"]) for run in advice.runs]


NOISE = [0.2, -0.2, 0.1, -0.1]  # what makes windows hard, for every run


def test_the_closest_run_is_advised_at_each_size_with_its_evidence(bare: Project) -> None:
    add_run(bare, "small", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "same-size", 51 * MB, [1.5 + 1.1 * x for x in NOISE])
    add_run(bare, "large", 99 * MB, [0.5 + 1.05 * x for x in NOISE])
    small, large = advice_of(bare)
    assert (small.budget, names(small)) == (51 * MB, ["small"])
    assert (large.budget, names(large)) == (99 * MB, ["large"])
    assert "same-size" in small.evidence
    assert "8 windows" in small.evidence
    assert "small, the next of 2" in large.evidence


def test_runs_that_are_not_told_apart_stand_together(bare: Project) -> None:
    add_run(bare, "one", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "other", 50 * MB, [1.02 - x for x in NOISE])
    add_run(bare, "worse", 50 * MB, [3.0 + 1.1 * x for x in NOISE])
    (advice,) = advice_of(bare)
    assert names(advice) == ["one", "other"]
    assert "Not told apart from other" in advice.evidence
    assert "worse" in advice.evidence


def test_other_windows_are_not_compared(bare: Project) -> None:
    add_run(bare, "one", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "other", 50 * MB, [3.0 + x for x in NOISE], evaluation={"length": 64})
    add_run(bare, "fewer", 50 * MB, [4.0, 4.1])
    (advice,) = advice_of(bare)
    assert names(advice) == ["one", "other", "fewer"]
    assert "not measured on the same windows" in advice.evidence


def test_nothing_larger_is_better(bare: Project) -> None:
    add_run(bare, "small", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "large", 99 * MB, [1.5 + 1.1 * x for x in NOISE])
    assert [names(advice) for advice in advice_of(bare)] == [["small"], ["small"]]
    write_report(
        results := read_results(bare.metrics, bare.details, bare.params),
        bare.params,
        page := bare.root / "r.html",
        bare.root / "r.csv",
    )
    assert len(results.found) == 4
    assert "as above: nothing larger is better" in page.read_text()


def test_a_broken_run_is_never_advised(bare: Project) -> None:
    add_run(bare, "broken", 50 * MB, [1.0 + x for x in NOISE], perplexity={"code": 1.16e8})
    (advice,) = advice_of(bare)
    assert names(advice) == []
    assert "broken" in advice.evidence


def test_many_sizes_become_few(bare: Project) -> None:
    for size in range(30):
        add_run(bare, f"run-{size}", (50 + 10 * size) * MB, [9.0 / (1 + size) + x for x in NOISE])
    found = advice_of(bare)
    assert 2 <= len(found) <= 4
    assert found[-1].budget == 340 * MB


def test_the_table_beside_the_page_names_states_and_places(bare: Project, tmp_path: Path) -> None:
    add_run(bare, "good", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "bad", 50 * MB, [1.5 + 1.1 * x for x in NOISE])
    add_run(bare, "broken", 50 * MB, [1.0 + x for x in NOISE], perplexity={"code": 1.16e8})
    bare.params["runs"]["failed"] = {"model": "smollm2", "method": "rtn"}
    results = read_results(bare.metrics, bare.details, bare.params)
    write_report(results, bare.params, tmp_path / "r.html", tmp_path / "r.csv")
    table = pd.read_csv(tmp_path / "r.csv", keep_default_na=False).set_index("name")
    assert dict(table["state"])["failed"] == "missing"
    assert dict(table["state"])["broken"] == "broken"
    assert table.loc["bad", "place"] == "not as good as good"
    assert table.loc["good", "place"] == "on the Pareto front"
    assert table.loc["good", "measured"] == "2026-11-22"
    assert float(table.loc["good", "megabytes"]) == 50


def test_what_is_broken_is_no_rival_on_the_front(bare: Project) -> None:
    add_run(bare, "good", 50 * MB, [1.0 + x for x in NOISE])
    add_run(bare, "broken", 40 * MB, [0.1 + x for x in NOISE], perplexity={"code": 1.16e8})
    (_, advice) = advice_of(bare)
    assert names(advice) == ["good"]
    results = read_results(bare.metrics, bare.details, bare.params)
    table = rows_of_runs(results, summary_frame(results)).set_index("name")
    assert table.loc["good", "place"] == "on the Pareto front"
    assert table.loc["broken", "place"] == ""
