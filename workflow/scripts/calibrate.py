"""Calibrate a model: cut text into windows and measure what its linear layers' inputs look like."""

from pathlib import Path

import typer

from llmpress.calibration.settings import CalibrationSettings
from llmpress.calibration.stage import calibrate_model, corpus_text, task_text
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section


def main(
    key: str = typer.Argument(help="A key of `calibrations` in params.yaml: a model's name."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/calibration/KEY: token windows and the second moments of all linears' inputs."""
    with script_errors():
        values = read_params(params)
        where = f"calibrations.{key}"
        settings = build(CalibrationSettings, section(values, where), where)
        corpora = {name: Path("data/corpora") / name for name in settings.corpora}
        tasks = {name: Path("data/tasks") / name for name in settings.tasks}
        calibrate_model(
            Path("data/models") / key,
            {name: corpus_text(folder) for name, folder in corpora.items()}
            | {name: task_text(folder) for name, folder in tasks.items()},
            settings,
            Path("data/calibration") / key,
            inputs={f"corpus {name}": folder for name, folder in corpora.items()}
            | {f"task {name}": folder for name, folder in tasks.items()},
            seed=values["seed"],
            device=pick_device(),
        )


if __name__ == "__main__":
    typer.run(main)
