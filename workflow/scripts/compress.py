"""Compress a model's linear layers by one method."""

from pathlib import Path

import typer

from llmpress.compression.settings import read_run
from llmpress.compression.stage import compress_model
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.methods.registry import build_method


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
            Path("data/compressed") / key,
            method_name=run.method,
            method=build_method(run.method, run.settings, f"runs.{key}"),
            calibration=Path("data/calibration") / run.model,
            seed=section(config, "seed"),
            device=pick_device(),
        )


if __name__ == "__main__":
    typer.run(main)
