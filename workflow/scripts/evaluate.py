"""Evaluate one model, run, delta run, finetune or training of params.yaml."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported: nothing goes online here
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import transformers
import typer

from llmpress.core.artifacts import write_json
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.evaluation.settings import read_evaluation
from llmpress.evaluation.stage import evaluate
from llmpress.evaluation.subjects import find_subject

METRICS, DETAILS = Path("results/metrics"), Path("results/details")


def main(
    key: str = typer.Argument(
        help="One of `evaluation.models`, or a key of `runs`, `delta_runs`, `finetunes` or "
        "`trainings`."
    ),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write results/metrics/KEY.json (numbers) and results/details/KEY.json (all about them)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with script_errors():
        config = read_params(params)
        settings = read_evaluation(config)
        device = str(pick_device())
        metrics, details = evaluate(find_subject(config, key), settings, device)
        for folder, record in ((METRICS, metrics), (DETAILS, details)):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{key}.json", record.model_dump())


if __name__ == "__main__":
    typer.run(main)
