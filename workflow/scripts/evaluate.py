"""Evaluate one model, run, delta run, finetune, training or peer of params.yaml."""

import os
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages are imported: nothing goes online here
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import transformers
import typer

from llmpress import evaluate_model
from llmpress.core.artifacts import write_json
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.evaluation.settings import read_evaluation
from llmpress.evaluation.subjects import find_subject

METRICS, DETAILS = Path("results/metrics"), Path("results/details")


def main(
    key: str = typer.Argument(
        help="One of `evaluation.models`, or a key of `runs`, `delta_runs`, `finetunes`, "
        "`trainings` or `peers`."
    ),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write results/metrics/KEY.json (numbers) and results/details/KEY.json (all about them)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with script_errors():
        config, data = read_params(params), Path("data")
        settings = read_evaluation(config)
        subject = find_subject(config, key)
        tasks = settings.tasks_of(subject.original)
        given = asdict(settings)
        for name in ("corpora", "split", "windows", "length", "tasks", "own_tasks"):
            del given[name]
        metrics, details = evaluate_model(
            subject.folder,
            original=subject.original_folder,
            base=subject.base_folder,
            reference=data / "references" / subject.original,
            tasks={data / "tasks" / name: items for name, items in tasks.items()},
            **given,
        )
        for folder, record in ((METRICS, metrics), (DETAILS, details)):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{key}.json", record.model_dump())


if __name__ == "__main__":
    typer.run(main)
