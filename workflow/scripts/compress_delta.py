"""Compress the delta of a fine-tuned model by one method."""

from pathlib import Path

import typer

from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.deltas.compression import compress_delta_artifact
from llmpress.deltas.settings import read_delta_run
from llmpress.methods.registry import build_method


def main(
    key: str = typer.Argument(help="A key of `delta_runs` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/compressed/KEY: delta.json, packed delta.safetensors and layers.json."""
    with script_errors():
        config = read_params(params)
        run = read_delta_run(config, key)
        method = build_method(run.method, run.settings, f"delta_runs.{key}")
        compress_delta_artifact(
            Path("data/deltas") / run.delta,
            Path("data/compressed") / key,
            method_name=run.method,
            method=method,
            calibration=Path("data/calibration") / run.finetuned,
            base=Path("data") / run.base if run.sequential else None,
            seed=section(config, "seed"),
            device=pick_device(),
        )


if __name__ == "__main__":
    typer.run(main)
