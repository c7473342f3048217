"""The report as a reader sees it. Skipped, and said so, where no Chromium is installed.

What was seen is left in build/screenshots.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from headless_browser import CHROMIUM, Page, browser
from report_project import DELTA_RUNS, WEIGHT_RUNS, Project, make_project

from llmpress.report.canvas import COLORS, GREY
from llmpress.report.html import write_report
from llmpress.report.tables import read_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium here: LAYOUT AND SCRIPTS OF THE REPORT ARE NOT TESTED"
    ),
]
WEIGHTS = {*WEIGHT_RUNS, "cluscomp-3bit-tuned"}
CHARTS = 5
CONTRASTS = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("browser") / "results")


@pytest.fixture(scope="module")
def report(project: Project) -> Path:
    results = read_results(project.metrics, project.details, project.params)
    path = project.root.parent / "report.html"
    write_report(results, project.params, path, path.with_name("report.csv"))
    return path


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400, 1920])
def test_fits_the_window_draws_every_chart_and_loads_nothing(
    report: Path, page: Page, width: int, dark: bool
) -> None:
    page.open(report, width=width, dark=dark)
    page.screenshot(f"report-{width}-{'dark' if dark else 'light'}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    charts = page.evaluate("document.querySelectorAll('[data-chart]').length")
    assert charts == CHARTS
    drawn = (
        "[...document.querySelectorAll('[data-chart]')].filter(c => c.querySelector('.main-svg'))"
    )
    assert page.evaluate(f"{drawn}.length") == charts
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("data:")] == [report.as_uri()]


def test_as_many_points_are_drawn_as_there_are_runs(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    points = "document.querySelectorAll('#{} .scatterlayer path.point').length"
    assert page.evaluate(points.format("quality-weights-0")) == len(WEIGHTS)
    assert page.evaluate(points.format("quality-deltas-1")) == len(DELTA_RUNS)
    rows = page.evaluate("document.querySelectorAll('.runs .sorted tr').length")
    assert rows == len(WEIGHTS) + len(DELTA_RUNS)
    models = page.evaluate("document.querySelectorAll('.runs .references tr').length")
    assert models == 3  # the original of the weights, that of the deltas and their base


def test_the_front_stands_in_the_legend(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    legend = (
        "[...document.querySelectorAll('#quality-weights-0 .legendtext')].map(t => t.textContent)"
    )
    assert "Pareto front" in page.evaluate(legend)
    choose(page, "#quality-weights-0 select", "perplexity_code")
    labels = (
        "[...document.querySelectorAll('#quality-weights-0 .annotation')].map(t => t.textContent)"
    )
    assert page.evaluate(labels) == ["smollm2"]


def test_pointing_at_a_run_tells_its_numbers(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    place = page.evaluate(
        "(() => { const point = document.querySelector('#quality-weights-0 path.point');"
        "point.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = point.getBoundingClientRect();"
        "return {x: box.x + box.width / 2, y: box.y + box.height / 2} })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    hover = page.evaluate(
        "new Promise(done => { const look = () => {"
        "const text = document.querySelector('#quality-weights-0 .hoverlayer text.nums');"
        "text ? done(text.textContent) : setTimeout(look, 20) }; look() })"
    )
    assert re.search(r"cluscomp-3bit.*MB on disk.*KL divergence, nats: mean", hover)
    assert "Pareto front" in hover or "not as good as" in hover


NAMES = (
    "[...document.querySelectorAll('.runs .sorted tr:not([hidden]) th')].map(t => t.textContent)"
)
STATUS = "document.querySelector('.filters [role=status]').textContent"
CLICK = (
    "[...document.querySelectorAll('.runs')].forEach(table => "
    "[...table.querySelectorAll('thead button')].find(b => b.textContent == {!r}).click())"
)


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(t => t.textContent.trim())"
    )


def choose(page: Page, selector: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const s = document.querySelector({selector!r}); s.value = {value!r};"
        "s.dispatchEvent(new Event('input', {bubbles: true}));"
        "s.dispatchEvent(new Event('change', {bubbles: true})) })()"
    )


def test_the_first_screen_tells_which_run_to_take(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    bottom = "document.querySelector('{}').getBoundingClientRect().{}"
    assert page.evaluate(bottom.format(".advice", "bottom")) < 650
    assert page.evaluate(bottom.format("#quality-weights-0 .plot", "top")) < 750
    assert page.evaluate(bottom.format(".advice table", "right")) <= 1400
    taken = (
        "[...document.querySelectorAll('.advice tr:not(.reference) .take')].map(t => t.textContent)"
    )
    assert "delta-come-1bit" in page.evaluate(taken)


def test_headings_sort_runs_and_leave_the_originals_on_top(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    page.evaluate(CLICK.format("bits per weight"))
    weights, deltas = len(WEIGHTS), len(DELTA_RUNS)
    names = page.evaluate(NAMES)
    assert (names[0], names[weights], len(names)) == (
        "cluscomp-3bit",
        "delta-svd",
        weights + deltas,
    )
    page.evaluate(CLICK.format("bits per weight"))
    assert page.evaluate(NAMES)[weights] == "magnitude"
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 2
    page.evaluate(CLICK.format("Name"))
    assert page.evaluate(NAMES)[weights] == "bitdelta"
    assert texts(page, ".runs .references tr:first-child th") == ["smollm2", "smollm2-arithmetic"]


def test_the_filter_and_sorting_keep_what_the_other_did(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    assert page.evaluate(STATUS) == "10 of 10 runs shown"
    choose(page, ".filters input", "SVD")
    assert set(page.evaluate(NAMES)) == {"svd-20pct", "delta-svd"}
    assert page.evaluate(STATUS) == "2 of 10 runs shown"
    page.evaluate(CLICK.format("Name"))
    assert page.evaluate(NAMES) == ["svd-20pct", "delta-svd"]
    choose(page, ".filters input", "cluscomp finetuned")
    assert page.evaluate(NAMES) == ["cluscomp-3bit-tuned"]
    choose(page, ".filters input", "no such run")
    assert page.evaluate(STATUS) == "0 of 10 runs shown"


def test_the_table_works_by_keyboard(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    page.evaluate("document.querySelector('.filters input').focus()")
    page.call("Input.insertText", text="tuned")
    assert page.evaluate(NAMES) == ["cluscomp-3bit-tuned"]
    page.press("Tab")
    page.press("Tab")
    page.press(" ", " ")  # the second group of columns
    label = page.evaluate("document.activeElement.labels[0].textContent.trim()")
    assert label == "KL divergence, nats"
    assert not page.evaluate("document.activeElement.checked")
    page.evaluate("document.querySelector('.runs thead button').focus()")
    page.press("Enter", "\r")
    assert page.evaluate("document.querySelector('[aria-sort]').textContent") == "Name"


def test_groups_of_columns_can_be_hidden_and_shown(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    shown = (
        "[...document.querySelectorAll('.runs .sorted tr:first-child [data-column]')]"
        ".filter(c => c.checkVisibility()).map(c => c.dataset.column)"
    )
    toggle = "document.querySelector('.filters [value=\"{}\"]').click()"
    assert {"mean_kl", "perplexity_code"} <= set(page.evaluate(shown))
    assert "kl_code" not in page.evaluate(shown)
    page.evaluate(toggle.format("Perplexity"))
    page.evaluate(toggle.format("KL divergence by corpus"))
    columns = page.evaluate(shown)
    assert "kl_code" in columns
    assert not [column for column in columns if column.startswith("perplexity_")]
    headings = "[...document.querySelectorAll('.runs thead th')].filter(c => c.checkVisibility())"
    assert "Perplexity" not in page.evaluate(f"{headings}.map(c => c.textContent)")
    page.evaluate(CLICK.format("bits per weight"))
    assert page.evaluate(shown) == columns


def test_a_link_opens_the_part_of_its_run(report: Path, page: Page) -> None:
    page.open(report, width=1400)
    page.evaluate("document.querySelector('.runs a[href=\"#run-gptq-3bit\"]').click()")
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    part = "document.getElementById('run-gptq-3bit')"
    assert page.evaluate(f"{part}.open")
    text = page.evaluate(f"{part}.innerText")
    for said in ("compressed by gptq", "Difference from smollm2", "mlp.down_proj",
                 "a continuation by smollm2", "a continuation by gptq-3bit"):  # fmt: skip
        assert said in text
    page.screenshot("report-run")


@pytest.mark.parametrize("width", [390, 1400])
def test_many_long_names_and_a_failed_run(page: Page, tmp_path: Path, width: int) -> None:
    project = make_project(tmp_path / "results")
    for copy in range(90):
        name = f"gptq-with-a-name-that-says-every-setting-of-the-model-and-more-{copy}"
        project.params["runs"][name] = project.params["runs"]["gptq-3bit"]
        for folder in (project.metrics, project.details):
            (folder / f"{name}.json").write_bytes((folder / "gptq-3bit.json").read_bytes())
    project.params["runs"]["failed"] = project.params["runs"]["gptq-3bit"]
    results = read_results(project.metrics, project.details, project.params)
    write_report(results, project.params, tmp_path / "r.html", tmp_path / "r.csv")
    page.open(tmp_path / "r.html", width=width)
    page.screenshot(f"report-many-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert "1 of 103 are missing: failed" in page.evaluate(
        "document.querySelector('header').innerText"
    )
    assert page.complaints() == []


def test_choices_change_the_chart(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    choose(page, "#quality-weights-0 select", "kl_code")
    label = page.evaluate(
        "document.querySelector('#quality-weights-0 .plot').getAttribute('aria-label')"
    )
    start = "Scatter plot of 6 runs: KL divergence, nats: code against MB on disk; on the"
    assert label.startswith(f"{start} Pareto front: ")


def test_what_a_run_does_not_have_cannot_be_chosen(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    choose(page, "#layers-allocation select", "svd-20pct")
    choose(page, "#layers-allocation label:nth-child(2) select", "Rank")
    choose(page, "#layers-allocation select", "cluscomp-3bit")
    second = "document.querySelector('#layers-allocation label:nth-child(2) select')"
    assert page.evaluate(f"{second}.value") == "bits_per_weight"
    usable = f"[...{second}.options].filter(o => !o.disabled).map(o => o.value)"
    assert page.evaluate(usable) == [
        "bits_per_weight",
        "Bits of a weight's code",
        "Codebook entries K",
        "Codebook vector length d",
    ]
    assert page.evaluate("document.querySelector('#layers-allocation .plot').hidden") is False


def numbers(page: Page, key: str) -> list[list[str]]:
    """The rows of a chart's table of numbers, the heading first."""
    page.evaluate(f"document.querySelector('#{key} .numbers summary').click()")
    page.evaluate("new Promise(done => setTimeout(done, 50))")  # toggle events come later
    rows = f"[...document.querySelectorAll('#{key} .numbers tr')]"
    return page.evaluate(f"{rows}.map(r => [...r.cells].map(c => c.textContent))")


def test_every_chart_gives_its_numbers_as_a_table(
    report: Path, page: Page, project: Project
) -> None:
    page.open(report, width=1280)
    head, *rows = numbers(page, "quality-weights-0")
    assert head == ["run", "MB on disk", "KL divergence, nats: mean", "place"]
    shown = {row[0]: row[1:3] for row in rows}
    for name in WEIGHTS:
        metrics = project.read("metrics", name)
        assert float(shown[name][0]) == pytest.approx(
            metrics["size"]["model_bytes"] / 1e6, rel=1e-3
        )
        divergence = metrics["quality"]["kl_divergence_nats"].values()
        assert float(shown[name][1]) == pytest.approx(sum(divergence) / 2, rel=1e-3)
    head, *rows = numbers(page, "layers-run")
    assert head == ["layer", "block 0", "block 1", "block 2", "block 3"]
    assert [row[0] for row in rows][-1] == "mlp.down_proj"
    choose(page, "#quality-weights-0 select", "kl_code")
    caption = "document.querySelector('#quality-weights-0 .numbers caption').textContent"
    assert "KL divergence, nats: code" in page.evaluate(caption)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_enough_contrast(report: Path, page: Page, dark: bool) -> None:
    page.open(report, width=1280, dark=dark)
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 1000
    assert [(text, round(ratio, 2)) for ratio, text in contrasts if ratio < 4.5] == []


def test_marks_have_enough_contrast_on_both_pages(report: Path) -> None:
    pages = re.findall(r"--page: (#\w{6})", report.read_text(encoding="utf-8"))
    assert len(pages) == 2
    for background in pages:
        for color in (*COLORS, GREY):
            low, high = sorted([_light(color), _light(background)])
            assert (high + 0.05) / (low + 0.05) >= 3, (color, background)


def _light(color: str) -> float:
    """Relative luminance of ``#rrggbb``, as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_what_can_be_used_has_a_name(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    page.call("Accessibility.disable")
    roles = {"button", "checkbox", "combobox", "link", "searchbox", "region", "table", "image"}
    seen: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in roles:
            seen.setdefault(role, []).append(node.get("name", {}).get("value", "").strip())
    assert not [(role, name) for role, names in seen.items() for name in names if not name]
    assert len(seen["image"]) == CHARTS
    assert {"searchbox", "combobox", "checkbox", "table"} <= set(seen)
    assert page.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    assert page.evaluate("document.querySelectorAll('main table:not(.numbers table)').length") > 10
    bare = "[...document.querySelectorAll('main table')].filter(t => !t.caption && t.rows.length)"
    assert page.evaluate(f"{bare}.length") == 0


def test_paper_holds_everything_but_the_controls(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    closed = "document.querySelectorAll('details:not([open], .numbers)').length"
    before = page.evaluate(closed)
    assert before > 0
    pdf = base64.b64decode(page.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 60
    page.call("Emulation.setEmulatedMedia", media="print", features=[])
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(closed) == 0
    visible = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"
    assert page.evaluate(visible.format(".filters, nav, .modebar, .numbers")) == 0
    assert page.evaluate(visible.format(".runs tbody tr, .pairs tr")) > 100
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(closed) == before
    page.call("Emulation.setEmulatedMedia", media="", features=[])


def test_a_browser_that_cannot_unpack_says_so(report: Path, page: Page, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    start = text.index('id="packed-figures">') + len('id="packed-figures">')
    broken.write_text(text[:start] + "AAAA" + text[text.index("<", start) :], encoding="utf-8")
    with pytest.raises(RuntimeError):
        page.open(broken, width=1280)
    note = page.evaluate("document.querySelector('#quality-weights-0 .note').textContent")
    assert note.startswith("The chart cannot be drawn: ")
