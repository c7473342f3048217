"""Parameters removed from a model in several ways, for the table of low-rank methods.

At each share of the whole model's weights that goes: Lillama, before and after distillation, plain
and activation-aware truncated SVD of every matrix alike, and whole decoder blocks removed.
Artifacts go to build/removal/out/; benchmarks/quality.py measures them.

    python benchmarks/removal.py MODEL CALIBRATION 0.1 0.2 0.3 0.4
"""

import math
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import typer
from tables import is_done
from torch import Tensor
from torch.nn import functional

from llmpress.calibration.files import load_windows
from llmpress.compression.stage import compress_model, model_shapes
from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.core.progress import progress
from llmpress.methods.base import Method
from llmpress.methods.lillama import Lillama
from llmpress.methods.svd import SVD
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.tuning.stage import finetune_model


class Mode(StrEnum):
    """Whose hidden states the student block is trained on."""

    both = "both"
    teacher = "teacher"
    student = "student"


def main(
    model: Path = typer.Argument(help="The original, a Hugging Face folder."),
    calibration: Path = typer.Argument(help="What `llmpress calibrate` wrote."),
    reductions: list[float] = typer.Argument(help="Shares of the whole model's weights to remove."),
    epochs: int = typer.Option(1, help="Of distillation; 0 leaves it out."),
    learning_rate: float = typer.Option(1e-3, help="Of distillation, relative to each factor."),
    batch_size: int = typer.Option(2, help="Windows of a step of distillation."),
    mode: Mode = typer.Option(
        Mode.student, help="Of distillation: one pass over it is half as long."
    ),
    peers: bool = typer.Option(True, help="Also truncated SVD and removed blocks."),
    out: Path = typer.Option(Path("build/removal/out"), help="Folder for the artifacts."),
) -> None:
    """Write out/NAME-REDUCTION for each way and share; finished ones are kept."""
    with script_errors():
        for reduction in reductions:
            lillama = Lillama(reduction=reduction)
            small, tuned = out / f"lillama-{reduction}", out / f"lillama-tuned-{reduction}"
            _compress(model, small, lillama, calibration)
            if epochs and not is_done(tuned):
                finetune_model(
                    small,
                    original=model,
                    calibration=calibration,
                    out=tuned,
                    epochs=epochs,
                    learning_rate=learning_rate,
                    batch_size=batch_size,
                    method=replace(lillama, mode=mode.value),
                    seed=0,
                    device=pick_device(),
                )
            if peers:
                keep = _kept_of_linears(model, reduction)
                for name, whiten in (("svd", False), ("whitened-svd", True)):
                    method = SVD(keep=keep, whiten=whiten)
                    _compress(model, out / f"{name}-{reduction}", method, calibration)
        if peers:
            _remove_blocks(model, calibration, reductions, out)


def _kept_of_linears(model: Path, reduction: float) -> float:
    """Return the share of the linears' weights that is left where this share of the model goes."""
    checkpoint = Checkpoint(model)
    total = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    shapes = (shape for block in model_shapes(skeleton(checkpoint)) for shape in block.values())
    return 1 - reduction * total / sum(math.prod(shape) for shape in shapes)


def _compress(model: Path, out: Path, method: Method, calibration: Path) -> None:
    if not is_done(out):
        compress_model(
            model, method=method, calibration=calibration, seed=0, device=pick_device(), out=out
        )


def _remove_blocks(model: Path, calibration: Path, reductions: list[float], out: Path) -> None:
    """Write the model without the blocks that turn the hidden states least, as ShortGPT does.

    Source: ShortGPT, arXiv 2403.03853: one minus the mean cosine between what enters a block and
    what leaves it. As many blocks go as fit into a reduction, so never more than was asked for.
    """
    wanted = {reduction: out / f"blocks-{reduction}" for reduction in reductions}
    wanted = {reduction: folder for reduction, folder in wanted.items() if not is_done(folder)}
    if not wanted:
        return
    checkpoint = Checkpoint(model)
    walk = BlockWalk(skeleton(checkpoint), checkpoint, device=pick_device())
    turns = _turns(walk, load_windows(calibration)[0])
    order = sorted(range(len(walk)), key=lambda index: turns[index])
    total = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    prefix = f"{walk.prefix}."
    size = sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names() if n.startswith(prefix))
    for reduction, folder in wanted.items():
        removed = sorted(order[: int(reduction * total // (size / len(walk)))])
        settings = {"method": "block_removal", "reduction": reduction, "removed": removed}
        inputs = {"model": model, "calibration": calibration}
        with artifact_folder(
            folder, stage="remove_blocks", settings=settings, inputs=inputs
        ) as place:
            _write_without(checkpoint, prefix, len(walk), removed, place)


def _write_without(
    checkpoint: Checkpoint, prefix: str, count: int, removed: list[int], folder: Path
) -> None:
    kept = [index for index in range(count) if index not in removed]
    writer = CheckpointWriter(folder)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name).to(torch.bfloat16)
        if not name.startswith(prefix):
            writer.add(name, tensor)
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if int(number) in kept:
            writer.add(f"{prefix}{kept.index(int(number))}.{rest}", tensor)
    writer.close()
    write_json(folder / "config.json", _shorter_config(checkpoint, kept))
    copy_companions(checkpoint.folder, folder)


def _shorter_config(checkpoint: Checkpoint, kept: list[int]) -> dict[str, Any]:
    config = checkpoint.plain_config()
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][index] for index in kept]
    return config | {
        "num_hidden_layers": len(kept),
        "dtype": "bfloat16",
    }


def _turns(walk: BlockWalk, windows: Tensor) -> list[float]:
    """Return one minus the mean cosine of each block's input and output."""
    entering, turns = walk.embed(windows), []
    for index in progress(range(len(walk)), "compare blocks"):
        leaving = walk.propagate(walk.load(index), index, entering)
        turns.append(1 - float(functional.cosine_similarity(entering, leaving, dim=-1).mean()))
        entering = leaving
    return turns


if __name__ == "__main__":
    typer.run(main)
