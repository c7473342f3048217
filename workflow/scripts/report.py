"""Write the report and the table of all runs from the metrics and details that exist."""

from pathlib import Path

import typer

from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.report.html import write_report
from llmpress.report.tables import read_results


def main(
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
    metrics: Path = typer.Option(Path("results/metrics"), help="Folder of <name>.json: numbers."),
    details: Path = typer.Option(
        Path("results/details"), help="Folder of <name>.json: settings, layers, samples."
    ),
    speed: Path = typer.Option(Path("results/speed.json"), help="What the stage speed measured."),
    out: Path = typer.Option(Path("results/report.html"), help="The report."),
    table: Path = typer.Option(Path("results/report.csv"), help="One row per model and run."),
    pipeline: Path = typer.Option(
        Path("dvc.yaml"), help="Tells which stage a missing result waits for."
    ),
    logs: Path = typer.Option(
        Path("logs"), help="Folder of <stage>/<name>.log, read for missing results only."
    ),
) -> None:
    """Write results/report.html and results/report.csv; missing results are named there."""
    with script_errors():
        config = read_params(params)
        results = read_results(metrics, details, config, speed)
        write_report(results, config, out, table, pipeline=pipeline, logs=logs)


if __name__ == "__main__":
    typer.run(main)
