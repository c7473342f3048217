"""Fetch or generate one task of params.yaml's `tasks` into data/tasks/<name>/ for lm-eval."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.failures import script_errors
from llmpress.core.params import build, read_params, section
from llmpress.data.rows import read_rows
from llmpress.data.sources.source import opened
from llmpress.data.tasks import arithmetic, calls, multiple_choice
from llmpress.data.tasks.configs import choice_config
from llmpress.data.tasks.files import write_task
from llmpress.data.tasks.source import TaskSource


def main() -> None:
    """Fetch or generate the task named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a key of `tasks`, such as arithmetic")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    with script_errors():
        params = read_params(arguments.params)
        where = f"tasks.{arguments.name}"
        source = build(TaskSource, section(params, where), where)
        settings = {**asdict(source), "seed": section(params, "seed")}
        out = Path("data/tasks") / arguments.name
        with artifact_folder(out, stage="fetch_task", settings=settings, inputs={}) as folder:
            origin: dict[str, Any] = {"generator": source.generator}
            if source.generator:
                generator = {"arithmetic": arithmetic, "calls": calls}[source.generator]
                config = generator.task_config(arguments.name)
                items = generator.generate(source.train_items, source.test_items, settings["seed"])
            else:
                with opened(source, [source.files or ""], hub_type="dataset") as fetched:
                    rows = [row for file in fetched.files for row in read_rows(file)]
                    origin = fetched.origin
                config = choice_config(arguments.name)
                items = {
                    "test": multiple_choice.convert(rows, source.template or "", settings["seed"])
                }
            write_task(folder, config, items)
            sizes = {split: len(records) for split, records in items.items()}
            write_json(
                folder / "info.json",
                {"source": origin, "license": source.license, "items": sizes},
            )


if __name__ == "__main__":
    main()
