"""Bring one stage of dvc.yaml up to date: the command of every Snakemake job.

Nothing is computed that lies in DVC's cache or, when a remote is configured, in the remote.
LLMPRESS_OFFLINE=1 leaves the remote alone. What the stage prints goes to its log; the terminal gets
a line when it starts, one a minute and one when it ends.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import yaml
from dvc.cli import main
from dvc.config import Config
from dvc.lock import make_lock
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

sys.path.insert(0, str(Path(__file__).parents[1]))
from progress import told


def run(stage: str, log: Path) -> int:
    """Reproduce ``stage`` alone and return DVC's exit status.

    DVC is told to wait for its lock, as several jobs run at a time; without that, a stage that has
    finished can still fail because another one is just being recorded.
    """
    config = Config.from_cwd()
    mend_list_of_locks(Path(config.dvc_dir) / "tmp", config["core"].get("hardlink_lock", False))
    remote = config["core"].get("remote")
    pull = ["--pull"] if remote and os.environ.get("LLMPRESS_OFFLINE") != "1" else []
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with told(stage, log, terminal) as job:
        repro = ["--wait-for-lock", "repro", "--single-item"]
        job.status = int(main([*repro, *pull, stage]))
        if job.status == 0 and not all(map(os.path.exists, outputs(stage))):
            # one that is kept in Git, not in the cache: with --pull DVC counts it as there
            job.status = int(main([*repro, "--force", stage]))
        sys.stdout.flush()
    return job.status


def mend_list_of_locks(folder: Path, hardlink: bool) -> None:
    """Remove DVC's list of locks where a process was killed in writing it: DVC would stop at it.

    Who writes it holds its guard, so what is no JSON under the guard is of nobody alive.
    """
    if is_whole(folder / RWLOCK_FILE):
        return
    with make_lock(
        str(folder / RWLOCK_LOCK), tmp_dir=str(folder), hardlink_lock=hardlink, wait=True
    ):
        if not is_whole(folder / RWLOCK_FILE):
            (folder / RWLOCK_FILE).unlink()


def is_whole(file: Path) -> bool:
    """Tell whether a file of JSON can be read, or is not there."""
    try:
        json.loads(file.read_bytes())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


def outputs(stage: str) -> list[str]:
    """Return the paths of a finished stage's outputs."""
    lock = yaml.load(Path("dvc.lock").read_bytes(), yaml.CSafeLoader)
    return [out["path"] for out in lock["stages"][stage].get("outs", ())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="a stage's name, such as compress@rtn-4bit")
    parser.add_argument("log", type=Path, help="where its output is kept")
    arguments = parser.parse_args()
    sys.exit(run(arguments.stage, arguments.log))
