"""Bring one stage of dvc.yaml up to date: the command of every Snakemake job.

Nothing is computed that lies in DVC's cache or, when a remote is configured, in the remote.
LLMPRESS_OFFLINE=1 leaves the remote alone. What the stage prints goes to its log; the terminal gets
a line when it starts, one a minute and one when it ends.
"""

import argparse
import os
import sys
from pathlib import Path

from dvc.cli import main
from dvc.config import Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from progress import told


def run(stage: str, log: Path) -> int:
    """Reproduce ``stage`` alone and return DVC's exit status.

    DVC is told to wait for its lock, as several jobs run at a time; without that, a stage that has
    finished can still fail because another one is just being recorded.
    """
    remote = Config.from_cwd()["core"].get("remote")
    pull = ["--pull"] if remote and os.environ.get("LLMPRESS_OFFLINE") != "1" else []
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with told(stage, log, terminal) as job:
        job.status = int(main(["--wait-for-lock", "repro", "--single-item", *pull, stage]))
        sys.stdout.flush()
    return job.status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="a stage's name, such as compress@rtn-4bit")
    parser.add_argument("log", type=Path, help="where its output is kept")
    arguments = parser.parse_args()
    sys.exit(run(arguments.stage, arguments.log))
