"""Calibrate a model: cut text into windows and measure what its linear layers' inputs look like."""

import dataclasses
from pathlib import Path

import torch
import typer

from llmpress.artifacts import artifact_folder
from llmpress.blocks import BlockWalk
from llmpress.calibration import CalibrationSettings, save_calibration
from llmpress.checkpoints import Checkpoint
from llmpress.config import build, read_params, script_errors, section
from llmpress.corpora import load_text, token_windows
from llmpress.hf import load_tokenizer, skeleton


def main(
    key: str = typer.Argument(help="A key of `calibrations` in params.yaml: a model's name."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/calibration/KEY: token windows and the second moments of all linears' inputs."""
    with script_errors():
        config = read_params(params)
        where = f"calibrations.{key}"
        settings = build(CalibrationSettings, section(config, where), where)
        model = Path("data/models") / key
        corpora = {name: Path("data/corpora") / name for name in settings.corpora}
        with artifact_folder(
            Path("data/calibration") / key,
            stage="calibrate",
            settings=dataclasses.asdict(settings),
            inputs={"model": model, **{f"corpus {name}": path for name, path in corpora.items()}},
        ) as folder:
            tokenizer = load_tokenizer(model)
            windows, validation = (
                torch.cat(
                    [
                        token_windows(load_text(path, split), tokenizer, settings.length, count)
                        for path in corpora.values()
                    ]
                )
                for split, count in (
                    ("calibration", settings.windows),
                    ("validation", settings.validation_windows),
                )
            )
            checkpoint = Checkpoint(model)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            walk = BlockWalk(
                skeleton(checkpoint), checkpoint, device=device, autocast=settings.autocast
            )
            save_calibration(walk, windows, validation, folder)


if __name__ == "__main__":
    typer.run(main)
