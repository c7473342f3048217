"""Calibrate a model: cut text into windows and measure what its linear layers' inputs look like."""

from dataclasses import asdict
from pathlib import Path

import typer

from llmpress import calibrate_model
from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section


def main(
    key: str = typer.Argument(help="A key of `calibrations` in params.yaml: a model's name."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/calibration/KEY: token windows and the second moments of all linears' inputs."""
    with script_errors():
        config, data = read_params(params), Path("data")
        where = f"calibrations.{key}"
        settings = asdict(build(CalibrationSettings, section(config, where), where))
        corpora = [data / "corpora" / name for name in settings.pop("corpora")]
        tasks = [data / "tasks" / name for name in settings.pop("tasks")]
        calibrate_model(
            data / "models" / key,
            text=[*corpora, *tasks],
            out=data / "calibration" / key,
            seed=section(config, "seed"),
            force=True,
            **settings,
        )


if __name__ == "__main__":
    typer.run(main)
