"""Compress a model's linear layers by one method."""

from pathlib import Path

import typer

from llmpress import build_method, compress_model
from llmpress.compression.settings import read_run
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section


def main(
    key: str = typer.Argument(help="A key of `runs` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/compressed/KEY: a Hugging Face folder with packed weights, and layers.json."""
    with script_errors():
        config = read_params(params)
        run = read_run(config, key)
        compress_model(
            Path("data/models") / run.model,
            method=build_method(run.method, run.settings, f"runs.{key}"),
            calibration=Path("data/calibration") / run.model,
            out=Path("data/compressed") / key,
            scratch=Path("scratch"),
            seed=section(config, "seed"),
            force=True,
        )


if __name__ == "__main__":
    typer.run(main)
