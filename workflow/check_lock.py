"""Compare the code that dvc.lock records with the code that is here; nothing is run.

What dvc.lock says was made by other code is not what this code makes. Only a run makes it true
again: `dvc repro` or snakemake, never `dvc commit`.

    python workflow/check_lock.py             # say what differs
    python workflow/check_lock.py --strict    # the same, with exit status 1
"""

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage


def differences(repo: Repo) -> dict[str, list[str]]:
    """Return, for each stage that is not recorded with today's code, the paths that differ.

    Code is what stages depend on and none makes. A stage that dvc.lock does not know has no paths.
    """
    stages: list[Stage] = list(repo.index.stages)
    made = [Path(out.fs_path) for stage in stages for out in stage.outs]

    @cache
    def is_code(path: Path) -> bool:
        return not any(path in (out, *out.parents) or out in path.parents for out in made)

    hashes = {}  # by path: most stages share their folders
    found = {}
    for stage in stages:
        code = [d for d in _files(stage) if is_code(Path(d.fs_path))]
        if not any(dependency.hash_info for dependency in code):
            found[stage.name] = []
            continue
        for dependency in code:
            if dependency.fs_path not in hashes:
                hashes[dependency.fs_path] = dependency.get_hash() if dependency.exists else None
            if dependency.hash_info != hashes[dependency.fs_path]:
                found.setdefault(stage.name, []).append(str(dependency))
    return found


def _files(stage: Stage) -> Iterator[Output]:
    return (d for d in stage.deps if d.protocol == "local" and not hasattr(d, "params"))


def main() -> int:
    """Print what differs in the project of the current folder and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strict", action="store_true", help="fail when anything differs")
    arguments = parser.parse_args()
    found = differences(Repo())
    for stage, paths in found.items():
        if paths:
            print(f"{stage}: {', '.join(paths)}")
    if found:
        absent = sum(not paths for paths in found.values())
        print(
            f"dvc.lock: {len(found) - absent} stages were made by other code, {absent} are not "
            "recorded; run `dvc repro` or snakemake"
        )
    return int(bool(found) and arguments.strict)


if __name__ == "__main__":
    sys.exit(main())
