"""Subtract a base model from its fine-tuned version, tensor by tensor."""

from pathlib import Path

import typer

from llmpress import extract_delta
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.deltas.settings import read_delta


def main(
    key: str = typer.Argument(help="A key of `deltas` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/deltas/KEY: fp32 deltas of linear layers, other changed tensors as they are."""
    with script_errors():
        delta, data = read_delta(read_params(params), key), Path("data")
        finetuned = data / "models" / delta.finetuned
        extract_delta(data / delta.base, finetuned, out=data / "deltas" / key, force=True)


if __name__ == "__main__":
    typer.run(main)
