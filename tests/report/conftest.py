from collections.abc import Iterator
from pathlib import Path

import pytest
from headless_browser import CHROMIUM, SCREENSHOTS
from report_project import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Results of a whole project, every run present."""
    return make_project(tmp_path / "results")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end what nobody looked at, or where what was seen can be looked at.

    The main process of pytest-xdist does not load this file; there the skipped tests are listed.
    """
    yield
    reports = [
        report
        for kind in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(kind, [])
        if "report/test_browser.py" in report.nodeid
    ]
    if reports and CHROMIUM is None:
        terminalreporter.section("NO CHROMIUM", sep="!", red=True, bold=True)
        terminalreporter.line(
            f"{len(reports)} tests of the report in a browser DID NOT RUN: its layout, scripts, "
            "contrast and printing are untested. Install chromium and run them again.",
            red=True,
            bold=True,
        )
    elif reports:
        terminalreporter.line(f"Screenshots of the report: {SCREENSHOTS}")
