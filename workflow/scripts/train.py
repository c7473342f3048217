"""Finetune a compressed model or delta, or adapters beside an original, end to end."""

from pathlib import Path

import transformers
import typer

from llmpress.calibration.stage import corpus_text
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params, section
from llmpress.data.tasks.files import TRAIN_FILE, read_items
from llmpress.training.data import task_data, text_data
from llmpress.training.settings import base_folder, read_training, start_folder
from llmpress.training.stage import finetune_artifact


def main(
    key: str = typer.Argument(help="A key of `trainings` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/trained/KEY: the compressed model or delta with trained values, or an adapter."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with script_errors():
        config = read_params(params)
        training, seed = read_training(config, key), section(config, "seed")
        settings = training.settings
        if training.task:
            task = Path("data/tasks") / training.task
            inputs = {"task": task}
        else:
            inputs = {f"corpus {name}": Path("data/corpora") / name for name in training.corpora}
        finetune_artifact(
            start_folder(training),
            Path("data/models") / training.model,
            Path("data/trained") / key,
            trains=training.trains,
            settings=settings,
            data=lambda tokenizer: (
                task_data(read_items(task / TRAIN_FILE), tokenizer, settings, seed)
                if training.task
                else text_data(
                    {path.name: corpus_text(path) for path in inputs.values()},
                    tokenizer,
                    settings,
                    seed,
                )
            ),
            inputs=inputs,
            described={
                "start": training.start,
                "task": training.task,
                "corpora": list(training.corpora),
            },
            seed=seed,
            device=pick_device(),
            base=base_folder(config, training),
        )


if __name__ == "__main__":
    typer.run(main)
