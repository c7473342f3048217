"""Compress a model with another tool: one entry of params.yaml's `peers`."""

from pathlib import Path

import typer

from llmpress.core.failures import script_errors
from llmpress.core.params import read_params
from llmpress.pipeline.peers import read_peer, run_peer

WORKFLOW = Path(__file__).resolve().parents[1]  # the project's, also where a study links to it


def main(
    key: str = typer.Argument(help="A key of `peers` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/peers/KEY: the dense weights that the tool's result stands for, and peer.json."""
    with script_errors():
        peer, data = read_peer(read_params(params), key), Path("data")
        run_peer(
            WORKFLOW / "peers" / peer.tool,
            model=data / "models" / peer.model,
            calibration=data / "calibration" / peer.model,
            settings=peer.settings,
            out=data / "peers" / key,
            environments=WORKFLOW.parent / "build/peers",
        )


if __name__ == "__main__":
    typer.run(main)
