"""``llmpress finetune``: a compressed model, or an adapter, learns a task or follows text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpress.cli.options import AsJson, Device, Force, Length, Model, Out, Seed, Set, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmpress.training.data import TrainingData
    from llmpress.training.settings import FinetuningSettings


def finetune(
    start: Model,
    out: Out,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")],
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Its peak.")],
    original: Annotated[
        str | None,
        typer.Option(help="The model that a compressed start was made from; adapters need none."),
    ] = None,
    trains: Annotated[
        str,
        typer.Option(
            help="compressed: codebooks or factors; lora: adapters beside a dense model; qlora: "
            "the same, its linears in 4-bit NF4."
        ),
    ] = "compressed",
    text: Text = None,
    items: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `query` and `target`, or a task folder, to learn."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Items or windows of a step.")] = 8,
    length: Length = 256,
    distill: Annotated[
        bool, typer.Option("--distill", help="Follow the original's predictions, not the text.")
    ] = False,
    set_: Set = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Finetune few parameters of a model end to end, on --text or on --items.

    The result is a model as small as its start, or an adapter with lora and qlora. The best state
    on held-out text or items is kept, never a worse one than the start. A killed run continues
    from its last look at them when it is repeated.

    Example: llmpress finetune small --original data/models/smollm2 --text data/corpora/wikipedia
    --distill --steps 60 --lr 5e-3 --out recovered
    """
    from llmpress.cli.options import check_out, model_folder, quiet, scratch_folder
    from llmpress.core.devices import pick_device
    from llmpress.core.errors import ConfigError
    from llmpress.training.settings import TRAINS
    from llmpress.training.stage import finetune_artifact

    quiet()
    check_out(out, force=force)
    here = [known for known in TRAINS if known != "delta"]  # which needs its base too: a stage
    if trains not in here:
        raise ConfigError(f"--trains {trains!r}: allowed are {', '.join(here)}")
    if trains == "compressed" and original is None:
        raise ConfigError("--original: name the model that the compressed one was made from")
    if bool(text) == bool(items):
        raise ConfigError("give either --text or --items to train on")
    settings = _settings(set_, steps, learning_rate, batch_size, length, distill=distill)
    place = pick_device(device)
    folder = model_folder(start)
    inputs = _inputs(text, items)

    def data(tokenizer: "PreTrainedTokenizerBase") -> "TrainingData":
        return _data(tokenizer, text, items, settings, seed)

    written = finetune_artifact(
        folder,
        folder if original is None else model_folder(original),
        out,
        trains=trains,
        settings=settings,
        data=data,
        inputs=inputs,
        described={
            "data": sorted(path.name for path in [*(text or []), *([items] if items else [])])
        },
        seed=seed,
        device=place,
        scratch=scratch_folder(out),
    )
    if written:
        _print(out, as_json=as_json)


def _settings(
    assignments: list[str] | None,
    steps: int,
    learning_rate: float,
    batch_size: int,
    length: int,
    *,
    distill: bool,
) -> "FinetuningSettings":
    from llmpress.cli.options import assignment
    from llmpress.core.params import build
    from llmpress.training.settings import FinetuningSettings

    given: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "length": length,
        "objective": "distillation" if distill else "next_token",
    }
    return build(FinetuningSettings, given | dict(map(assignment, assignments or ())), "--set")


def _inputs(text: list[Path] | None, items: Path | None) -> dict[str, Path]:
    """Return the data that are artifacts, by role."""
    from llmpress.cli.texts import corpus_inputs

    return {"task": items} if items and items.is_dir() else corpus_inputs(text or [])


def _data(
    tokenizer: "PreTrainedTokenizerBase",
    text: list[Path] | None,
    items: Path | None,
    settings: "FinetuningSettings",
    seed: int,
) -> "TrainingData":
    from llmpress.cli.texts import calibration_texts
    from llmpress.data.tasks.files import TRAIN_FILE, read_items
    from llmpress.training.data import task_data, text_data

    if items is None:
        return text_data(calibration_texts(text or []), tokenizer, settings, seed)
    file = items / TRAIN_FILE if items.is_dir() else items
    return task_data(read_items(file), tokenizer, settings, seed)


def _print(out: Path, *, as_json: bool) -> None:
    from llmpress.cli.output import print_facts, print_json
    from llmpress.core.artifacts import TRAINING, read_json, read_provenance

    record, made = read_json(out / TRAINING), read_provenance(out)
    if as_json:
        print_json({"folder": str(out), **record})
        return
    kept = f"step {record['best_step']}" if record["best_step"] else "the start, nothing was better"
    print_facts(
        str(out),
        [
            (
                "trains",
                f"{record['trains']}: {record['trainable_parameters']:,} parameters, "
                f"{100 * record['trainable_share']:.2f} % of the model's",
            ),
            ("held-out loss", f"{record['loss_before']:.4f} -> {record['loss_after']:.4f} nats"),
            ("kept", kept),
            ("took", f"{made['seconds']:.0f} s"),
        ],
    )
