"""Fine-tune one model of params.yaml's `finetuned_models` into data/models/<name>/."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section
from llmpress.data.corpora import load_text, token_windows
from llmpress.data.tasks.files import read_items
from llmpress.training.examples import encode, window_examples
from llmpress.training.full import TrainingSettings, add_tokens, finetune


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
        seed = section(params, "seed")
        base = Path("data/models") / settings.base
        text = (
            {"task": Path("data/tasks") / settings.task}
            if settings.task
            else {"corpus": Path("data/corpora") / str(settings.corpus)}
        )
        with artifact_folder(
            Path("data/models") / arguments.name,
            stage="train_task",
            settings={**asdict(settings), "seed": seed},
            inputs={"base": base, **text},
        ) as folder:
            tokenizer = AutoTokenizer.from_pretrained(base)
            # for answers this short, plain matrix products beat the fused attention's backward
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, attn_implementation="eager" if settings.task else "sdpa"
            ).to(pick_device())
            new_tokens = add_tokens(model, tokenizer, settings.added_tokens)
            if settings.task:
                examples = encode(read_items(text["task"] / "train.jsonl"), tokenizer)
            else:
                documents = load_text(text["corpus"], "calibration")
                examples = window_examples(
                    token_windows(documents, tokenizer, settings.length, settings.windows)
                )
            losses = finetune(model, examples, settings, seed, new_tokens=new_tokens)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            record = {"settings": asdict(settings), "seed": seed, "losses": losses}
            write_json(folder / "training.json", record)


if __name__ == "__main__":
    main()
