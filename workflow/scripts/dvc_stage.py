"""Bring one stage of dvc.yaml up to date: the command of every Snakemake job.

Nothing is computed that lies in DVC's cache or, when a remote is configured, in the remote.
LLMPRESS_OFFLINE=1 leaves the remote alone.
"""

import argparse
import os
import sys

from dvc.cli import main
from dvc.config import Config


def run(stage: str, log: str) -> int:
    """Reproduce ``stage`` alone and return DVC's exit status.

    DVC is told to wait for its lock, as several jobs run at a time; without that, a stage that has
    finished can still fail because another one is just being recorded.
    """
    remote = Config.from_cwd()["core"].get("remote")
    pull = ["--pull"] if remote and os.environ.get("LLMPRESS_OFFLINE") != "1" else []
    status = int(main(["--wait-for-lock", "repro", "--single-item", *pull, stage]))
    if status:
        print(f"stage {stage} failed; its log: {log}", file=sys.stderr)
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="a stage's name, such as compress@rtn-4bit")
    parser.add_argument("log", help="where its output is kept, named when the stage fails")
    arguments = parser.parse_args()
    sys.exit(run(arguments.stage, arguments.log))
