"""``llmpress finetune``: a compressed model, or an adapter, learns a task or follows text."""

import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llmpress.cli.options import AsJson, Device, Force, Length, Model, Out, Seed, Set, Text


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
    from llmpress import fetch_model, train_model
    from llmpress.cli.options import assignment, quiet
    from llmpress.core.artifacts import free_place
    from llmpress.core.errors import ConfigError

    quiet()
    free_place(out, force=force)
    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "length": length,
        "objective": "distillation" if distill else "next_token",
        **dict(map(assignment, set_ or ())),
    }
    options = inspect.signature(train_model).parameters.keys() - {"steps", "learning_rate"}
    if taken := sorted(options & settings.keys()):
        raise ConfigError(f"--set {taken[0]}: is no setting of the training")
    train_model(
        fetch_model(start),
        out=out,
        trains=trains,
        original=None if original is None else fetch_model(original),
        text=text,
        items=items,
        seed=seed,
        device=device,
        force=force,
        **settings,
    )
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one has written
        _print(out, as_json=as_json)


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
