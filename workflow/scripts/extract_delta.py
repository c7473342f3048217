"""Subtract a base model from its fine-tuned version, tensor by tensor."""

from pathlib import Path

import typer

from llmpress.artifacts import artifact_folder
from llmpress.checkpoints import Checkpoint
from llmpress.config import read_params, script_errors, section
from llmpress.delta_extraction import extract_delta


def main(
    key: str = typer.Argument(
        help="A key of `deltas` in params.yaml: the fine-tuned model's name."
    ),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/deltas/KEY: fp32 deltas of linear layers, other changed tensors as they are."""
    with script_errors():
        base_name = section(read_params(params), f"deltas.{key}.base")
        base, finetuned = Path("data/models") / base_name, Path("data/models") / key
        with artifact_folder(
            Path("data/deltas") / key,
            stage="extract_delta",
            settings={"base": base_name},
            inputs={"base": base, "finetuned": finetuned},
        ) as folder:
            extract_delta(Checkpoint(base), Checkpoint(finetuned), folder)


if __name__ == "__main__":
    typer.run(main)
