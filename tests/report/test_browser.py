"""The report as a reader sees it. Skipped, and said so, where no Chromium is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from headless_browser import CHROMIUM, Page, browser
from report_project import make_project

from llmpress.report.html import write_report
from llmpress.report.tables import read_results

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: LAYOUT AND SCRIPTS OF THE REPORT ARE NOT TESTED"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    project = make_project(folder / "results")
    results = read_results(project.metrics, project.details, project.params)
    write_report(results, project.params, folder / "report.html", folder / "summary.csv")
    return folder / "report.html"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_window_draws_every_chart_and_loads_nothing(
    report: Path, page: Page, width: int
) -> None:
    page.open(report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    charts = page.evaluate("document.querySelectorAll('[data-chart]').length")
    assert charts == 10
    drawn = (
        "[...document.querySelectorAll('[data-chart]')].filter(c => c.querySelector('.main-svg'))"
    )
    assert page.evaluate(f"{drawn}.length") == charts
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("data:")] == [report.as_uri()]


def test_headings_sort(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    click = (
        "[...document.querySelectorAll('.runs button')].find(b => b.textContent == {!r}).click()"
    )
    first = "document.querySelector('.runs tbody th').textContent"
    page.evaluate(click.format("bits per weight"))
    assert page.evaluate(first) == "delta-svd"
    page.evaluate(click.format("bits per weight"))
    assert page.evaluate(first) == "smollm2"
    assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
    page.evaluate(click.format("Name"))
    assert page.evaluate(first) == "bitdelta"
    page.evaluate(click.format("recovery"))  # models have none: last, whatever the direction
    last = "[...document.querySelectorAll('.runs tbody tr')].slice(-2).map(r => r.className)"
    assert page.evaluate(last) == ["model", "model"]
    page.evaluate(click.format("recovery"))
    assert page.evaluate(last) == ["model", "model"]


def test_choices_change_the_chart(report: Path, page: Page) -> None:
    page.open(report, width=1280)
    page.evaluate(
        "const s = document.querySelector('#quality-0 select'); s.value = 'kl_code';"
        "s.dispatchEvent(new Event('change'))"
    )
    label = page.evaluate("document.querySelector('#quality-0 .plot').getAttribute('aria-label')")
    assert label == "Scatter plot of 6 runs: KL divergence, nats: code against bits per weight."


def test_text_is_readable_in_the_dark(report: Path, page: Page) -> None:
    page.open(report, width=1280, dark=True)
    fill = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    assert page.evaluate(fill) == "rgb(231, 235, 240)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
