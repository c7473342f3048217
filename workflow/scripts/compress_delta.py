"""Compress the delta of a fine-tuned model by one method."""

from pathlib import Path

import typer

from llmpress import build_method, compress_delta
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.deltas.settings import read_delta_run


def main(
    key: str = typer.Argument(help="A key of `delta_runs` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/compressed/KEY: delta.json, packed delta.safetensors and layers.json."""
    with script_errors():
        config = read_params(params)
        run = read_delta_run(config, key)
        compress_delta(
            Path("data/deltas") / run.delta,
            method=build_method(run.method, run.settings, f"delta_runs.{key}"),
            base=Path("data") / run.base,
            calibration=Path("data/calibration") / run.finetuned,
            sequential=run.sequential,
            out=Path("data/compressed") / key,
            scratch=Path("scratch"),
            seed=section(config, "seed"),
            force=True,
        )


if __name__ == "__main__":
    typer.run(main)
