"""``llmpress report``: one page of a folder of metrics."""

from pathlib import Path
from typing import Annotated

import typer

Metrics = Annotated[
    Path,
    typer.Argument(
        help="Folder of <name>.json as the pipeline's evaluation writes them; settings, windows "
        "and samples are read from the folder `details` beside it."
    ),
]
Page = Annotated[Path, typer.Option("--out", "-o", help="The page; its table is beside it, .csv.")]
Params = Annotated[
    Path | None,
    typer.Option(
        help="A params.yaml whose names to show, the missing ones too; else all there are."
    ),
]


def report(
    metrics: Metrics,
    out: Page = Path("report.html"),
    params: Params = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
) -> None:
    """Write one self-contained page, and a CSV file beside it: which run to take, and why.

    Example: llmpress report results/metrics --out report.html
    """
    from llmpress.core.errors import ArtifactError, ConfigError
    from llmpress.core.params import read_params
    from llmpress.report.html import write_report
    from llmpress.report.tables import read_results

    if out.suffix != ".html":
        raise ConfigError(f"--out {out} must end in .html: the table is written beside it as .csv")
    table = out.with_suffix(".csv")
    for path in (out, table):
        if path.exists() and not force:
            raise ConfigError(f"{path} exists: choose another --out, or add --force")
    if not metrics.is_dir():
        raise ArtifactError(
            f"{metrics} is no folder: give that of the metrics, results/metrics say"
        )
    config = read_params(params) if params else None
    results = read_results(metrics, metrics.parent / "details", config)
    if not results.found:
        raise ArtifactError(f"{metrics} holds no result: evaluate a run, or name another folder")
    write_report(results, config or {}, out, table)
    typer.echo(f"{out} and {table}: {len(results.found)} models and runs")
