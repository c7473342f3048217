"""Vary one choice of a method at a time and show what it costs."""

from pathlib import Path

import typer
import yaml

from llmpress.core.failures import script_errors
from llmpress.core.params import build
from llmpress.evaluation.ablations import Ablation, measured
from llmpress.report.ablations import markdown, write_page


def main(
    method: str = typer.Argument(help="A method with a file workflow/ablations/METHOD.yaml."),
    as_markdown: bool = typer.Option(False, "--markdown", help="Print the tables too."),
) -> None:
    """Write results/ablations/METHOD.html; rows that are known are not measured again."""
    with script_errors():
        folder = Path("workflow/ablations")
        text = (folder / f"{method}.yaml").read_text(encoding="utf-8")
        ablation = build(Ablation, yaml.safe_load(text), method)
        rows = measured(ablation, folder / f"{method}.rows.json")
        page = Path("results/ablations") / f"{method}.html"
        write_page(ablation, rows, folder / "page.html.j2", page)
        if as_markdown:
            print(markdown(ablation, rows))


if __name__ == "__main__":
    typer.run(main)
