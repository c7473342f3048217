"""Finetune a compressed model block by block against the original one."""

from pathlib import Path

import typer

from llmpress.compression.settings import read_run
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.methods.registry import build_method
from llmpress.tuning.settings import read_finetune
from llmpress.tuning.stage import tune_model


def main(
    key: str = typer.Argument(help="A key of `finetunes` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/finetuned/KEY: the compressed model with trained codebooks or factors."""
    with script_errors():
        config = read_params(params)
        finetune = read_finetune(config, key)
        run = read_run(config, finetune.run)
        tune_model(
            Path("data/compressed") / finetune.run,
            Path("data/models") / run.model,
            Path("data/calibration") / run.model,
            Path("data/finetuned") / key,
            method=build_method(run.method, run.settings, f"runs.{finetune.run}"),
            settings=finetune.settings,
            record={"run": finetune.run, "method": run.method},
            seed=section(config, "seed"),
            device=pick_device(),
        )


if __name__ == "__main__":
    typer.run(main)
