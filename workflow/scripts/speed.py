"""Time the runs that params.yaml names, each in turns with its original."""

from pathlib import Path

import typer

from llmpress.core.artifacts import write_json
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params
from llmpress.evaluation.settings import SpeedSettings
from llmpress.evaluation.speed import measure_speed
from llmpress.evaluation.subjects import find_subject


def main(
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
    out: Path = typer.Option(Path("results/speed.json"), help="What was measured."),
) -> None:
    """Write results/speed.json; nothing else should run on the machine meanwhile."""
    with script_errors():
        config = read_params(params)
        settings = build(SpeedSettings, config.get("speed", {}), "speed")
        subjects = [find_subject(config, name) for name in settings.runs]
        measured = measure_speed(subjects, settings, Path("data/references"), pick_device(None))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, measured.model_dump())


if __name__ == "__main__":
    typer.run(main)
