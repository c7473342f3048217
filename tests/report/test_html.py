import base64
import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from report_project import DELTA_RUNS, WEIGHT_RUNS, Project, make_project

from llmpress.evaluation.metrics import Speed
from llmpress.report.canvas import TEMPLATE
from llmpress.report.gaps import find_gaps
from llmpress.report.html import render, write_text
from llmpress.report.tables import read_results, summary_frame

MAX_BYTES = 6_000_000
NAMES = ["smollm2", "smollm2-arithmetic", *WEIGHT_RUNS, "cluscomp-3bit-tuned", *DELTA_RUNS]
ATTACK = "</script><script>alert('hit')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page with their attributes, and the cells of the table of all runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, dict[str, str]] = {}
        self.row = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "a" and str(attributes["href"]).startswith("#run-"):
            self.row = str(attributes["href"]).removeprefix("#run-")
        if tag == "td" and "data-column" in attributes:
            column = str(attributes["data-column"])
            self.cells.setdefault(self.row, {})[column] = str(attributes["data-value"])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(project: Project) -> str:
    results = read_results(project.metrics, project.details, project.params)
    gaps = find_gaps(results.missing, project.params)
    return render(results, summary_frame(results), project.params, gaps)


def unpacked(page: str, name: str) -> str:
    (packed,) = re.findall(rf'<script type="text/plain" id="packed-{name}">([\w+/=]+)<', page)
    return gzip.decompress(base64.b64decode(packed)).decode()


def chart_data(page: str) -> dict[str, dict[str, Any]]:
    return json.loads(unpacked(page, "figures"))["charts"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    project = make_project(tmp_path_factory.mktemp("report") / "results")
    return project, page_of(project)


def test_table_holds_the_numbers_of_the_metrics_files(whole: tuple[Project, str]) -> None:
    project, page = whole
    cells = Page(page).cells
    assert len(cells) == 12
    for name, row in cells.items():
        metrics = project.read("metrics", name)
        assert float(row["bits_per_weight"]) == metrics["size"]["bits_per_weight"]
        assert int(row["model_bytes"]) == metrics["size"]["model_bytes"]
        assert float(row["ratio"]) == metrics["size"]["ratio"]
        cost = metrics["cost"]
        assert float(row["make_seconds"]) == cost["compress_seconds"] + cost["finetune_seconds"]
        assert float(row["perplexity_code"]) == metrics["quality"]["perplexity"]["code"]
        assert float(row["kl_code"]) == metrics["quality"]["kl_divergence_nats"]["code"]
        assert float(row["accuracy_piqa"]) == metrics["quality"]["tasks"]["piqa"]["accuracy"]


def test_shown_numbers_have_units_and_errors(project: Project) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["quality"]["perplexity"]["wikipedia"] = 27.1234
        metrics["quality"]["tasks"]["piqa"] |= {"accuracy": 0.515625, "stderr": 0.0625}
        metrics["size"]["model_bytes"] = 102_404_000
        metrics["cost"]["compress_seconds"] = 0.0  # nothing was done

    project.edit("metrics", "gptq-3bit", edit)
    text = page_of(project)
    table = text[text.index('id="runs"') :]
    row = table[table.index('<a href="#run-gptq-3bit"') :].split("</tr>")[0]
    for column, shown in (
        ("perplexity_wikipedia", "27.12 ± 0.52"),
        ("accuracy_piqa", "51.6 ± 6.2"),
        ("model_bytes", "102.4"),
        ("make_seconds", "—"),
    ):
        assert re.search(rf'data-column="{column}"[^>]*>{re.escape(shown)}</td>', row), column


def test_points_of_the_quality_charts_are_the_numbers(whole: tuple[Project, str]) -> None:
    project, page = whole
    variants = chart_data(page)["quality-weights-0"]
    perplexity = points_of(variants["perplexity_wikipedia|bits_per_weight"])
    accuracy = points_of(variants["accuracy_piqa|ratio"])
    assert set(perplexity) == set(accuracy) == {*WEIGHT_RUNS, "cluscomp-3bit-tuned"}
    for name in perplexity:
        metrics = project.read("metrics", name)
        size, quality = metrics["size"], metrics["quality"]
        assert perplexity[name] == pytest.approx(
            (size["bits_per_weight"], quality["perplexity"]["wikipedia"], 0.52), rel=1e-6
        )
        piqa = quality["tasks"]["piqa"]
        assert accuracy[name] == pytest.approx(
            (size["ratio"], 100 * piqa["accuracy"], 100 * piqa["stderr"]), rel=1e-6
        )


def points_of(figure: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Run -> x, y and, where it is drawn, the length of the error bar."""
    points = {}
    for trace in figure["data"]:
        if "hovertext" in trace:
            arrays = [trace["x"], trace["y"]]
            arrays += [trace["error_y"]["array"]] if "error_y" in trace else []
            values = zip(*(np.frombuffer(_decoded(a), "<f4") for a in arrays), strict=True)
            points |= dict(zip((name.strip() for name in trace["hovertext"]), values, strict=True))
    return points


def _decoded(array: dict[str, str]) -> bytes:
    return base64.b64decode(array["bdata"])


def test_originals_are_lines_and_finetuning_is_joined(whole: tuple[Project, str]) -> None:
    data = chart_data(whole[1])
    weights = data["quality-weights-0"]["perplexity_code|bits_per_weight"]["data"]
    assert line_names(weights) == ["smollm2", None, "Pareto front"]
    deltas = data["quality-deltas-1"]["mean_accuracy|ratio"]["data"]
    assert line_names(deltas) == ["smollm2-arithmetic", "smollm2", "Pareto front"]
    agreement = data["quality-deltas-1"]["top1_agreement_code|ratio"]["data"]
    assert line_names(agreement) == ["Pareto front"]  # a model agrees with itself


def line_names(traces: list[dict[str, Any]]) -> list[str | None]:
    return [trace.get("name") for trace in traces if trace["mode"] == "lines"]


def test_points_on_the_front_are_filled_and_the_others_tell_who_is_better(project: Project) -> None:
    for loss, name in enumerate(("cluscomp-3bit-tuned", "cluscomp-3bit", "gptq-3bit", "rtn-4bit")):
        set_losses(project, name, [2.5 + loss + 0.01 * window for window in (-1, 1, 2, -2)])
    figure = chart_data(page_of(project))["quality-weights-0"]["perplexity_code|bits_per_weight"]
    points = {
        name.strip(): (symbol, said)
        for trace in figure["data"]
        if "hovertext" in trace
        for name, symbol, said in zip(
            trace["hovertext"], trace["marker"]["symbol"], trace["customdata"], strict=True
        )
    }
    assert points["cluscomp-3bit-tuned"] == ("star", "on the Pareto front")
    symbol, said = points["rtn-4bit"]
    assert symbol.endswith("-open")
    assert said == "not as good as cluscomp-3bit-tuned"
    assert figure["layout"]["meta"]["alt"].endswith("on the Pareto front: cluscomp-3bit-tuned.")


def set_losses(project: Project, name: str, losses: list[float]) -> None:
    """Give a run these losses of its windows of code, and the perplexity that follows."""
    windows = dict.fromkeys(("loss_nats", "kl_divergence_nats", "top1_agreement"), losses)
    project.edit("details", name, lambda d: d["windows"].update(code=windows))
    perplexity = math.exp(sum(losses) / len(losses))
    project.edit("metrics", name, lambda m: m["quality"]["perplexity"].update(code=perplexity))


@pytest.mark.parametrize(("noise", "apart"), [(0.01, True), (1.0, False)], ids=["more", "chance"])
def test_a_run_is_hollow_only_if_another_is_better_beyond_chance(
    noise: float, apart: bool, project: Project
) -> None:
    set_losses(project, "rtn-4bit", [2.5 + noise * sign for sign in (1, -1, 1, -1)])
    set_losses(project, "cluscomp-3bit", [2.3 + noise * sign for sign in (-1, 1, 1, -1)])
    keep = ("rtn-4bit", "cluscomp-3bit")
    for file in project.metrics.glob("*.json"):
        if file.stem not in (*keep, "smollm2"):
            file.unlink()
    figure = chart_data(page_of(project))["quality-weights-0"]["perplexity_code|bits_per_weight"]
    (trace,) = (t for t in figure["data"] if "hovertext" in t and "rtn-4bit" in t["hovertext"][0])
    assert trace["marker"]["symbol"][0].endswith("-open") == apart
    said = "not as good as cluscomp-3bit" if apart else "not told apart from cluscomp-3bit"
    assert trace["customdata"] == [said]


def test_what_cannot_be_drawn_is_said(project: Project) -> None:
    project.edit(
        "metrics", "rtn-4bit", lambda m: m["quality"]["kl_divergence_nats"].update(code=0.0)
    )
    variants = chart_data(page_of(project))["quality-weights-0"]
    assert "rtn-4bit" in variants["kl_code|bits_per_weight"]["layout"]["meta"]["note"]
    assert variants["kl_wikipedia|bits_per_weight"]["layout"]["meta"]["note"] == ""


def test_a_broken_run_does_not_press_the_others_together(project: Project) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["quality"]["perplexity"]["code"] = 1.36e8

    project.edit("metrics", "svd-20pct", edit)
    page = page_of(project)
    variants = chart_data(page)["quality-weights-0"]
    for figure in variants.values():
        assert figure["layout"]["meta"]["note"].startswith("Not drawn (broken): svd-20pct.")
        assert "svd-20pct" not in points_of(figure)
    table = page[page.index('id="runs"') :]
    row = table[table.index('<a href="#run-svd-20pct"') :].split("</tr>")[0]
    assert re.search(r'data-column="perplexity_code" data-value="136000000.0">broken</td>', row)
    assert "1.36e+08" not in page


def test_sizes_far_apart_get_a_logarithmic_axis(project: Project) -> None:
    def axis() -> dict[str, Any]:
        variants = chart_data(page_of(project))["quality-weights-0"]
        return variants["perplexity_code|bits_per_weight"]["layout"]["xaxis"]

    assert axis()["type"] == "log"
    low, high = (10 ** float(end) for end in axis()["range"])
    assert 2 < low < 3.02 < 12.8 < high < 16
    for name in ("svd-20pct", "lillama-20pct"):
        project.edit("metrics", name, lambda m: m["size"].update(bits_per_weight=4.0))
    assert axis().get("type") is None
    assert axis()["range"] == pytest.approx([3.02 - 0.442, 4.42 + 0.442])


def test_names_that_crowd_are_left_out_aloud(project: Project) -> None:
    for copy in range(30):
        name = f"gptq-copy-{copy}"
        project.params["runs"][name] = project.params["runs"]["gptq-3bit"]
        for folder in (project.metrics, project.details):
            (folder / f"{name}.json").write_bytes((folder / "gptq-3bit.json").read_bytes())
    figure = chart_data(page_of(project))["quality-weights-0"]["perplexity_code|bits_per_weight"]
    assert "names are left out" in figure["layout"]["meta"]["note"]
    assert len(points_of(figure)) == 36
    written = [name for trace in figure["data"] for name in trace.get("text", []) if name]
    assert 0 < len(written) < 6


def test_every_choice_has_a_variant_and_a_label(whole: tuple[Project, str]) -> None:
    text = whole[1]
    for part in re.findall(r'<figure class="chart".*?</figure>', text, re.DOTALL):
        assert part.count("<label>") == part.count("<select>")
    variants = chart_data(whole[1])
    assert len(variants["layers-run"]) == 10 * 2
    assert len(variants["finetuning-blocks"]) == 1


def test_every_figure_is_one_that_plotly_accepts(whole: tuple[Project, str]) -> None:
    go.layout.Template(TEMPLATE)
    for variants in chart_data(whole[1]).values():
        for figure in variants.values():
            go.Figure(figure)


def test_plotly_is_held_whole_and_its_hash_allowed(whole: tuple[Project, str]) -> None:
    source = unpacked(whole[1], "plotly")
    assert source == get_plotlyjs()
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    assert f"&#39;sha256-{digest}&#39;" in whole[1] or f"'sha256-{digest}'" in whole[1]


def test_a_missing_run_is_named(project: Project) -> None:
    (project.metrics / "gptq-3bit.json").unlink()
    page = page_of(project)
    section = page[page.index('<section id="missing"') :].split("</section>")[0]
    assert "gptq-3bit" in missing_of(section)
    assert "There is no gptq-3bit.json" in section
    assert "1 of 12 are missing" in page
    assert "gptq-3bit" not in Page(page).cells


def missing_of(section: str) -> set[str]:
    """Names in the first column of the table of what has no result."""
    table = section.partition('aria-label="No result"')[2].partition("</table>")[0]
    return set(re.findall(r'<th scope="row">(.*?)</th>', table))


@pytest.mark.parametrize(
    "kept", [(), ("smollm2",), ("gptq-3bit",), ("delta-come-1bit", "bitdelta")]
)
def test_partial_results(project: Project, kept: tuple[str, ...]) -> None:
    for folder in (project.metrics, project.details):
        for path in folder.iterdir():
            if path.stem not in kept:
                path.unlink()
    page = page_of(project)
    assert set(Page(page).cells) == set(kept)
    assert f"{12 - len(kept)} of 12 are missing" in page


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(gone=st.sets(st.tuples(st.sampled_from(["metrics", "details"]), st.sampled_from(NAMES))))
def test_any_subset_of_files_gives_a_report(
    whole: tuple[Project, str], tmp_path: Path, gone: set[tuple[str, str]]
) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    for folder in ("metrics", "details"):
        (root / folder).mkdir()
        for name in NAMES:
            if (folder, name) not in gone:
                os.link(whole[0].root / folder / f"{name}.json", root / folder / f"{name}.json")
    page = page_of(Project(root, whole[0].params))
    without = {name for folder, name in gone if folder == "metrics"}
    assert set(Page(page).cells) == set(NAMES) - without
    section = page[page.index('<section id="missing"') :].split("</section>")[0]
    assert missing_of(section) == without
    for name in {name for folder, name in gone if folder == "details"} - without:
        assert f"{name} has no details file" in page


def test_results_without_details(project: Project) -> None:
    for path in project.details.iterdir():
        path.unlink()
    page = page_of(project)
    assert len(Page(page).cells) == 12
    assert "rtn-4bit has no details file" in page


def test_text_of_models_is_escaped(project: Project) -> None:
    def edit(details: dict[str, Any]) -> None:
        details["samples"][0] = {"prompt": ATTACK, "text": ATTACK}
        details["settings"][ATTACK] = ATTACK
        details["layers"]["layers"][0]["name"] = f"model.layers.0.{ATTACK}"

    project.edit("details", "gptq-3bit", edit)
    page = page_of(project)
    assert "&lt;img src=x" in page
    assert "<img" not in page
    parsed = Page(page)
    assert sum("type" not in script for script in parsed.all("script")) == 3
    assert not [a for _, a in parsed.elements if any(key.startswith("on") for key in a)]
    assert chart_data(page)["layers-run"]


def test_nothing_is_loaded_from_anywhere(whole: tuple[Project, str]) -> None:
    page = whole[1]
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    assert not re.search(r"https?:|//cdn|@import|url\(", page)
    (policy,) = [m["content"] for m in parsed.all("meta") if m.get("http-equiv")]
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")


def test_links_within_the_page_lead_somewhere(whole: tuple[Project, str]) -> None:
    parsed = Page(whole[1])
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in parsed.all("a"):
        assert str(attributes["href"])[1:] in ids


def test_size_with_thirty_blocks_and_many_runs(tmp_path: Path) -> None:
    project = make_project(tmp_path / "results", blocks=30)
    for copy in range(20):
        name = f"gptq-copy-{copy}"
        project.params["runs"][name] = project.params["runs"]["gptq-3bit"]
        for folder in (project.metrics, project.details):
            (folder / f"{name}.json").write_bytes((folder / "gptq-3bit.json").read_bytes())
    page = page_of(project)
    assert len(Page(page).cells) == 32
    assert len(page.encode()) < MAX_BYTES / 2


def test_low_bit_source_and_conditions_are_told(whole: tuple[Project, str]) -> None:
    page = whole[1]
    assert "The source of smollm2 was a 4-bit GGUF file" in page
    assert "8 windows of 512 tokens of each corpus" in page
    assert "64 items of arc-easy" in page
    assert "2026-11-22 10:03:11 UTC" in page
    assert "Intel(R) Xeon(R) Processor, 2 cores, 1 thread, no GPU" in page
    assert "Not evaluated alike" not in page


def test_results_measured_differently_are_marked(project: Project) -> None:
    project.edit("details", "gptq-3bit", lambda d: d["evaluation"].update(windows=4))
    page = page_of(project)
    assert "Not evaluated alike, windows per corpus: 8 for smollm2" in page
    assert "smollm2-arithmetic" not in page.partition("Not evaluated alike")[2].partition("</p>")[0]
    assert "Runs that are compared were not evaluated alike." in page


def test_same_results_same_bytes(whole: tuple[Project, str]) -> None:
    assert page_of(whole[0]) == whole[1]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_script_runs_alone(project: Project, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps(project.params))  # JSON is YAML
    script = Path(__file__).parents[2] / "workflow" / "scripts" / "report.py"
    command = [sys.executable, str(script), "--params", str(params)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "smollm2-arithmetic" in (tmp_path / "results" / "report.csv").read_text()
    (project.metrics / "rtn-4bit.json").write_text("{")
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert re.fullmatch(r"error: .*rtn-4bit\.json.*\n", failed.stderr)


def test_speed_is_shown_with_its_spread_and_only_where_it_was_measured(project: Project) -> None:
    assert 'id="speed"' not in page_of(project)
    run = {
        "original": "smollm2",
        "prefill_tokens_per_second": 400.0,
        "decode_tokens_per_second": 20.0,
        "prefill_ratios": [0.5, 0.75, 0.625],
        "decode_ratios": [1.5, 1.25, 1.375],
    }
    measured = {
        "runs": {"gptq-3bit": run},
        "prefill_tokens": 128,
        "decode_tokens": 8,
        "dtype": "bfloat16",
        "device": "cpu",
        "num_threads": 2,
        "hardware": {"processor": "a processor", "gpu": None},
    }
    file = project.root / "speed.json"
    file.write_text(json.dumps(Speed.model_validate(measured).model_dump()), encoding="utf-8")
    results = read_results(project.metrics, project.details, project.params, file)
    page = render(results, summary_frame(results), project.params, find_gaps({}, {}))
    section = page[page.index('id="speed"') :]
    for text in ("1.38 (1.25 to 1.50)", "0.62 (0.50 to 0.75)", "a processor", "threads: 2"):
        assert text in section
