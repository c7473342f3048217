"""Fetch one text corpus of params.yaml's `corpora` into data/corpora/<name>/, split 80/10/10."""

import argparse
from dataclasses import asdict
from pathlib import Path

from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section
from llmpress.data.corpora import split_documents, write_text
from llmpress.data.documents import CorpusSource, read_documents, stdlib_documents
from llmpress.data.sources.source import opened


def main() -> None:
    """Fetch and split the corpus named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a key of `corpora`, such as wikipedia")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    with script_errors():
        params = read_params(arguments.params)
        where = f"corpora.{arguments.name}"
        source = build(CorpusSource, section(params, where), where)
        settings = {**asdict(source), "seed": section(params, "seed")}
        out = Path("data/corpora") / arguments.name
        with artifact_folder(out, stage="fetch_corpus", settings=settings, inputs={}) as folder:
            if source.python_stdlib:
                documents, origin = stdlib_documents(source.max_characters)
            else:
                with opened(source, [source.files], hub_type="dataset") as fetched:
                    documents = read_documents(fetched.files, source.field, source.max_characters)
                    origin = fetched.origin
            sizes = write_text(folder, split_documents(documents, settings["seed"]))
            info = {"source": origin, "license": source.license, "splits": sizes}
            write_json(folder / "info.json", info)


if __name__ == "__main__":
    main()
