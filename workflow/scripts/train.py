"""Finetune a compressed model or delta, or adapters beside an original, end to end."""

from pathlib import Path

import transformers
import typer

from llmpress.config import read_params, section
from llmpress.devices import pick_device
from llmpress.failures import script_errors
from llmpress.finetuning.data import task_data, text_data
from llmpress.finetuning.finetune import finetune_artifact
from llmpress.finetuning.settings import base_folder, read_training, start_folder
from llmpress.model_calibration import corpus_text
from llmpress.tasks.files import read_items


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
                task_data(read_items(task / "train.jsonl"), tokenizer, settings, seed)
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
