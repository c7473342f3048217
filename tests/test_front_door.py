"""README and quickstart are short, true and run: every command they show, on a tiny model."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from command_line import llmpress
from dvc.cli import parse_args
from tiny_models import library_text

from llmpress.core.artifacts import artifact_folder, read_json
from llmpress.data.corpora import split_documents, write_text

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def default_run(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages suppose to be there, of the tiny model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "data/models/smollm2")
    for name in ("wikipedia", "code"):
        corpus = Path("data/corpora") / name
        with artifact_folder(corpus, stage="fetch_corpus", settings={}, inputs={}) as folder:
            documents = library_text(("asyncio", "xml", "http", "email"))
            write_text(folder, split_documents(documents, 0))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command that a page's shell blocks show."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.usefixtures("default_run")
@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_pages_runs(page: str) -> None:
    code = blocks(page, "python")
    assert "llmpress.compress_model(" in code[0]
    for block in code:
        exec(compile(block, page, "exec"), {})
    assert read_json(next(Path().glob("*/layers.json")))["totals"]["bits_per_weight"] < 4


def install(arguments: list[str]) -> None:
    """Check that what pip would install exists; it would take minutes and a network."""
    (what,) = arguments
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    assert found, what
    assert set((found[1] or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])


def dry_run(*command: str) -> None:
    """Run a command of the engines or of make in the project, without doing anything."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("default_run")
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_runs(page: str) -> None:
    shown = commands(page)
    assert len(shown) > 4
    for words in shown:
        match words:
            case ["llmpress", *arguments]:
                done = llmpress(*arguments)
                assert done.code == 0, (words, done.err)
            case ["make", target]:
                dry_run("make", "-n", target)
            case ["snakemake", *arguments]:
                dry_run("snakemake", "-n", "--quiet", "all", *arguments)
            case ["pip", "install", *arguments]:
                install(arguments)
            case ["dvc", *arguments]:
                parse_args(arguments)  # raises SystemExit for an option that does not exist
            case ["source", ".venv/bin/activate"]:
                pass  # what make sets up
            case _:
                pytest.fail(f"{page} shows a command that no test runs: {shlex.join(words)}")


def paragraphs(text: str) -> list[str]:
    """What is prose: no code, tables, headings, comments or heads of pages."""
    text = re.sub(
        r"\A---\n.*?\n---\n|^ *```.*?^ *```|<!--.*?-->",
        "\n\n",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    found = [part.strip() for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if part and not part.startswith(("#", "|", "!["))]


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 125
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []
    versions = re.compile(r"Python 3[^,]*,")
    numbers = [re.findall(r"\b\d[\d.,]*\b", versions.sub("", part)) for part in paragraphs(text)]
    assert max(map(len, numbers)) <= 3
    assert len(re.findall(r"^\| (?!---|run |folder |method )", text, re.MULTILINE)) <= 4 + 8 + 5
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "CONTRIBUTING.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_prose_of_the_documentation_is_wrapped(page: Path) -> None:
    lines = [line for part in paragraphs(page.read_text()) for line in part.splitlines()]
    shown = [line for line in lines if not line.lstrip().startswith("|")]
    assert [line for line in shown if len(line) > 100] == []
