"""Finetune a compressed model block by block against the original one."""

from dataclasses import asdict
from pathlib import Path

import typer

from llmpress import finetune_model
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.tuning.settings import read_finetune


def main(
    key: str = typer.Argument(help="A key of `finetunes` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/finetuned/KEY: the compressed model with trained codebooks or factors."""
    with script_errors():
        config = read_params(params)
        finetune = read_finetune(config, key)
        finetune_model(
            Path("data/compressed") / finetune.run,
            original=Path("data/models") / finetune.model,
            calibration=Path("data/calibration") / finetune.model,
            out=Path("data/finetuned") / key,
            scratch=Path("scratch"),
            seed=section(config, "seed"),
            force=True,
            **asdict(finetune.settings),
        )


if __name__ == "__main__":
    typer.run(main)
