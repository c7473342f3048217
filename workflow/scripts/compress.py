"""Compress a model's linear layers by one method."""

from pathlib import Path

import typer

from llmpress.config import read_params, section
from llmpress.devices import pick_device
from llmpress.failures import script_errors
from llmpress.model_compression import compress_model
from llmpress.runs import build_method, read_run


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
