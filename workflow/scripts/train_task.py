"""Fine-tune one model of params.yaml's `finetuned_models` into data/models/<name>/."""

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section
from llmpress.data.corpora import load_text, token_windows
from llmpress.data.tasks.files import TRAIN_FILE, read_items
from llmpress.training.examples import Example, encode, window_examples
from llmpress.training.full import train_all_weights
from llmpress.training.settings import TrainingSettings


def main() -> None:
    """Train the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a key of `finetuned_models`, such as smollm2-arithmetic")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    with script_errors():
        params = read_params(arguments.params)
        where = f"finetuned_models.{arguments.name}"
        settings = build(TrainingSettings, section(params, where), where)
        text = (
            {"task": Path("data/tasks") / settings.task}
            if settings.task
            else {"corpus": Path("data/corpora") / str(settings.corpus)}
        )

        def examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
            if settings.task:
                return encode(read_items(text["task"] / TRAIN_FILE), tokenizer)
            documents = load_text(text["corpus"], "calibration")
            windows = token_windows(documents, tokenizer, settings.length, settings.windows)
            return window_examples(windows)

        train_all_weights(
            Path("data/models") / settings.base,
            Path("data/models") / arguments.name,
            settings=settings,
            examples=examples,
            text=text,
            seed=section(params, "seed"),
            device=pick_device(),
        )


if __name__ == "__main__":
    main()
