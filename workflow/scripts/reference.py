"""Run an original on the text of the evaluation once, for all that is compared with it."""

from pathlib import Path

import typer

from llmpress import make_reference
from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.evaluation.settings import read_evaluation


def main(
    key: str = typer.Argument(help="One of `evaluation.models` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/references/KEY: token windows, and what the model KEY predicts on them."""
    with script_errors():
        data, settings = Path("data"), read_evaluation(read_params(params))
        make_reference(
            data / "models" / key,
            text=[data / "corpora" / name for name in settings.corpora],
            out=data / "references" / key,
            split=settings.split,
            windows=settings.windows,
            length=settings.length,
            dtype=settings.dtype,
            force=True,
        )


if __name__ == "__main__":
    typer.run(main)
