"""``llmpress hub``: artifacts to and from a Hugging Face hub repository."""

from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.options import AsJson, Force, Out

app = typer.Typer(help="Send artifacts to the Hugging Face hub, and bring them back.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An artifact: a compressed model or delta.")],
    repository: Annotated[str, typer.Argument(help="owner/name; made when it is not there.")],
    revision: Annotated[str | None, typer.Option(help="Branch to write to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an artifact after verifying it. The token comes from HF_TOKEN or `hf auth login`."""
    from llmpress import push_artifact
    from llmpress.cli.output import print_facts, print_json

    commit = push_artifact(folder, repository, revision=revision, private=not public)
    if as_json:
        print_json({"repository": repository, "commit": commit})
    else:
        print_facts(f"Pushed {folder}", [("repository", repository), ("commit", commit)])


@app.command()
def fetch(
    repository: Annotated[str, typer.Argument(help="owner/name@revision")],
    out: Out,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Download an artifact, verify every file against its provenance, and copy it to --out."""
    from llmpress import fetch_artifact
    from llmpress.cli.output import print_facts, print_json

    fetch_artifact(repository, out=out, force=force)
    if as_json:
        print_json({"repository": repository, "folder": str(out)})
    else:
        print_facts(f"Fetched {repository}", [("folder", str(out))])
