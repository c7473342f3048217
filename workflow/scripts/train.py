"""Finetune a compressed model or delta, or adapters beside an original, end to end."""

from dataclasses import asdict
from pathlib import Path

import transformers
import typer

from llmpress import train_model
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.training.settings import base_folder, read_training, start_folder


def main(
    key: str = typer.Argument(help="A key of `trainings` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/trained/KEY: the compressed model or delta with trained values, or an adapter."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with script_errors():
        config, data = read_params(params), Path("data")
        training = read_training(config, key)
        train_model(
            start_folder(training),
            original=data / "models" / training.model,
            base=base_folder(config, training),
            trains=training.trains,
            text=[data / "corpora" / name for name in training.corpora],
            items=data / "tasks" / training.task if training.task else None,
            record={
                "start": training.start,
                "task": training.task,
                "corpora": list(training.corpora),
            },
            out=data / "trained" / key,
            scratch=Path("scratch"),
            seed=section(config, "seed"),
            force=True,
            **asdict(training.settings),
        )


if __name__ == "__main__":
    typer.run(main)
