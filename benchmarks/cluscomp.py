"""ClusComp at several sizes for the quality table: compressed, then finetuned block by block.

Artifacts go to build/quality/out/; benchmarks/quality.py measures them beside the peers.

    python benchmarks/cluscomp.py MODEL CALIBRATION BITS...
"""

from pathlib import Path

import typer
from tables import is_done

from llmpress.compression.stage import compress_model
from llmpress.core.devices import pick_device
from llmpress.core.failures import script_errors
from llmpress.methods.cluscomp import ClusComp
from llmpress.tuning.stage import finetune_model


def main(
    model: Path = typer.Argument(help="The original, a Hugging Face folder."),
    calibration: Path = typer.Argument(help="What `llmpress calibrate` wrote."),
    bits: list[float] = typer.Argument(help="True bits per weight over all linears."),
    iterations: int = typer.Option(10, help="Lloyd iterations of k-means."),
    epochs: int = typer.Option(1, help="Of block-wise finetuning."),
    learning_rate: float = typer.Option(
        None, help="Of block-wise finetuning; by default 0.03 at 2.2 bits, half of it a bit more."
    ),
    batch_size: int = typer.Option(2, help="Windows of a step of block-wise finetuning."),
    out: Path = typer.Option(Path("build/quality/out"), help="Folder for the artifacts."),
) -> None:
    """Write out/cluscomp-BITS and out/cluscomp-BITS-tuned; finished ones are kept."""
    with script_errors():
        for size in bits:
            method = ClusComp(bits=size, iterations=iterations)
            small, tuned = out / f"cluscomp-{size}", out / f"cluscomp-{size}-tuned"
            if not is_done(small):
                compress_model(
                    model,
                    method=method,
                    calibration=calibration,
                    seed=0,
                    device=pick_device(),
                    out=small,
                )
            if epochs and not is_done(tuned):
                finetune_model(
                    small,
                    original=model,
                    calibration=calibration,
                    out=tuned,
                    epochs=epochs,
                    learning_rate=learning_rate or rate_at(size),
                    batch_size=batch_size,
                    method=method,
                    seed=0,
                    device=pick_device(),
                )


def rate_at(bits: float) -> float:
    """Return a rate in proportion to the error that is left: steps larger than that do harm."""
    return round(0.03 * 2 ** (2.2 - bits), 4)


if __name__ == "__main__":
    typer.run(main)
