"""Shared fixtures: tiny trained models, and artifacts made from them (tiny_artifacts.py)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by transformers

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import enable_progress_bars
from tiny_models import (
    ARCHITECTURES,
    HELD_OUT_PACKAGES,
    QUICK_ARCHITECTURES,
    build_architecture,
    build_tiny_finetuned,
    build_tiny_model,
    built_once,
    library_text,
    tokenize,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

pytest_plugins = ["hub_fixtures", "tiny_artifacts"]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all pytest-xdist workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_model_folder(shared_folder: Path) -> Path:
    """A trained Llama: 3 layers, hidden 64, 4 heads over 2 key-value heads, FFN 176, 512 tokens."""
    return built_once(shared_folder, "tiny-model", build_tiny_model)


@pytest.fixture(scope="session")
def tiny_finetuned_folder(shared_folder: Path, tiny_model_folder: Path) -> Path:
    """The tiny model trained further; its block weights and norms differ from the base's."""
    return built_once(
        shared_folder,
        "tiny-finetuned",
        lambda folder: build_tiny_finetuned(tiny_model_folder, folder),
    )


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=() if name in QUICK_ARCHITECTURES else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture other than Llama in turn; make quick takes some of them."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def architecture_folder(shared_folder: Path, tiny_model_folder: Path, architecture: str) -> Path:
    """A trained model of the architecture: 2 layers, hidden 64, 512 tokens."""
    return built_once(
        shared_folder,
        f"tiny-{architecture}",
        lambda folder: build_architecture(architecture, tiny_model_folder, folder),
    )


@pytest.fixture(scope="session")
def tiny_windows(tiny_model_folder: Path) -> Tensor:
    """Token windows of text that no tiny model was trained on: int64 ``[16, 64]``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)
    tokens = tokenize(tokenizer, library_text(HELD_OUT_PACKAGES))
    return tokens[: 16 * 64].view(16, 64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, and with progress bars."""
    enable_progress_bars()
    random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end that nobody looked at the report, or where it can be looked at."""
    yield
    reports = [
        report
        for kind in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(kind, [])
        if "report/test_browser.py" in report.nodeid
    ]
    if reports and all(report.skipped for report in reports):
        terminalreporter.section("NO CHROMIUM", sep="!", red=True, bold=True)
        terminalreporter.line(
            f"{len(reports)} tests of the report in a browser DID NOT RUN: its layout, scripts, "
            "contrast and printing are untested. Install chromium and run them again.",
            red=True,
            bold=True,
        )
    elif reports:
        folder = Path(__file__).parents[1] / "build/screenshots"
        terminalreporter.line(f"Screenshots of the report: {folder}")
