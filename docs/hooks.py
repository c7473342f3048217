"""What the site takes from elsewhere while it is built, so that it cannot fall behind.

``math`` code blocks become MathML, which browsers draw without a script; ``command-line.md`` is
written by the command itself; a comment ``<!-- README: Results -->`` is replaced by that section of
README.md, and ``<!-- METHODS -->`` by a table of what the methods' pages say at their head; methods
and decisions are listed from their folders.
"""

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils.meta import get_data

COMMANDS = "command-line.md"
README = Path("README.md")
INCLUDE = re.compile(r"<!-- README: (.+?) -->")
OVERVIEW = "<!-- METHODS -->"
COLUMNS = {
    "for": "for",
    "stores": "what it stores",
    "calibration": "needs calibration",
    "tuned": "finetuned block by block",
}
"""Of the table of methods, by their key at the head of a method's page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw ``math`` blocks, and list methods and decisions."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _mathml}]
    docs = Path(config.docs_dir)
    decisions = sorted(path.relative_to(docs).as_posix() for path in docs.glob("decisions/*.md"))
    for entry in config.nav or ():
        if isinstance(entry, dict) and entry.get("Decisions") == "decisions":
            entry["Decisions"] = decisions
        if isinstance(entry, dict) and entry.get("Methods") == "methods":
            names = ["index", *(page.stem for page in method_pages(docs)), "adding"]
            entry["Methods"] = [f"methods/{name}.md" for name in names]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the command line's reference."""
    files.append(File.generated(config, COMMANDS, content=command_reference()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in sections of README.md and the table of methods."""
    if OVERVIEW in markdown:
        markdown = markdown.replace(OVERVIEW, overview(Path(page.file.abs_src_path or "").parent))
    folder = os.path.dirname(page.file.src_uri)  # noqa: PTH120 - an address, no path
    return INCLUDE.sub(lambda found: _section(found[1], folder), markdown)


def method_pages(docs: Path) -> list[Path]:
    """Return the pages of methods: those with something at their head."""
    pages = sorted(docs.glob("methods/*.md"))
    return [page for page in pages if get_data(page.read_text(encoding="utf-8"))[1]]


def overview(folder: Path) -> str:
    """Return the table of methods."""
    rows = [["method", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for page in method_pages(folder.parent):
        said = get_data(page.read_text(encoding="utf-8"))[1]
        rows.append([f"[`{page.stem}`]({page.name})", *(str(said[key]) for key in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def command_reference() -> str:
    """Return the Markdown that typer writes of every command, its options and their defaults."""
    import typer.cli
    import typer.main

    from llmpress.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("llmpress", [], resilient_parsing=True)
    text: str = typer.cli.get_docs_for_click(obj=command, ctx=context, name="llmpress")
    return text.replace("# `llmpress`", "# Command line", 1)


def _section(heading: str, folder: str) -> str:
    """Return a section of README.md without its heading, its links relative to ``folder``."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    if found is None:
        raise PluginError(f"README.md has no section {heading!r}")
    to_docs = "../" * folder.count("/") + ("../" if folder else "")
    return found[1].strip().replace("](docs/", f"]({to_docs}")


def _mathml(source: str, *_: Any, **__: Any) -> str:
    """Draw a formula in LaTeX, as GitHub does for the same block."""
    return str(convert(source.strip(), display="block"))
