"""A toy project with a git repository, a DVC remote and this project's own bridge and profile."""

import atexit
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"
REAL_FILES = (
    "workflow/check_lock.py",
    "workflow/dvc_bridge.py",
    "workflow/progress.py",
    "workflow/envs/llmpress.yaml",
    "workflow/report/report.rst",
    "workflow/rules/stages.smk",
    "workflow/scripts/dvc_stage.py",
    "profiles/default/config.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)
EVERY_STAGE = [
    "calibrate@a",
    "compress@x",
    "compress@y",
    "evaluate@x",
    "evaluate@y",
    "fetch@a",
    "report",
    "train@b",
]
# Imports the engines once; each line it is sent is a command that runs in a process of its own, as
# by the command's script. A command that takes longer than three minutes is ended.
SERVER = """
import gc, json, os, signal, sys
import dvc.cli, dvc.repo, snakemake.cli, snakemake.api, torch

gc.freeze()  # nor are they looked through in every process
for line in sys.stdin:
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
job = json.loads(line)
os.setsid()
signal.alarm(180)
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
printed = os.open(job["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), printed, printed)):
    os.dup2(descriptor, number)
ours = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
sys.path[:1] = [os.path.dirname(sys.executable), *map(os.path.abspath, ours)]
sys.argv = job["command"]
engine = {"dvc": dvc.cli, "snakemake": snakemake.cli}[sys.argv[0]]
try:
    code = engine.main()
except SystemExit as end:
    code = end.code
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)
"""


@cache
def _server() -> "subprocess.Popen[str]":
    """Start it, once for each process of tests."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "HOME": os.devnull},  # nothing of the user's
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


@dataclass(frozen=True)
class Project:
    """A working copy of the toy project, in which commands are run as a user would."""

    folder: Path

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the processes' environment: this interpreter's commands, nothing of the user's."""
        base = self.folder.parent
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(base),
            "XDG_CACHE_HOME": str(base / "cache"),
            "DVC_SITE_CACHE_DIR": str(base / "site-cache"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "toy",
            "GIT_AUTHOR_EMAIL": "toy@example.org",
            "GIT_COMMITTER_NAME": "toy",
            "GIT_COMMITTER_EMAIL": "toy@example.org",
            "TOY_JOURNAL": str(base / f"{self.folder.name}.journal"),
            **extra,
        }

    def start(self, *command: str, **extra: str) -> subprocess.Popen[str]:
        """Start a command in the project's folder, in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, status: int = 0, **extra: str) -> str:
        """Run a command, check its exit status and return what it printed."""
        if command[0] in ("dvc", "snakemake"):
            code, printed = self.run_imported(command, extra)
        else:
            process = self.start(*command, **extra)
            printed, _ = process.communicate(timeout=180)
            code = process.returncode
        assert code == status, f"{' '.join(command)}:\n{printed}"
        return printed

    def run_imported(self, command: Sequence[str], extra: Mapping[str, str]) -> tuple[int, str]:
        """Run a command whose imports are done already; return its status and what it printed."""
        server, printed = _server(), self.folder.parent / f"{self.folder.name}.printed"
        job = {"command": command, "folder": str(self.folder), "printed": str(printed)}
        job["environment"] = self.environment(**extra)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), printed.read_text(encoding="utf-8")

    def snakemake(self, *options: str, status: int = 0, **extra: str) -> str:
        """Run snakemake as README says."""
        return self.run("snakemake", "--cores", "2", *options, status=status, **extra)

    def dvc(self, *options: str, status: int = 0, **extra: str) -> str:
        """Run dvc."""
        return self.run("dvc", *options, status=status, **extra)

    def engine(self, name: str, status: int = 0, **extra: str) -> str:
        """Bring everything up to date with one of the two engines."""
        if name == "dvc":
            return self.dvc("repro", "--pull", status=status, **extra)
        return self.snakemake(status=status, **extra)

    def ran(self) -> list[str]:
        """Return the stages that computed something since the last call, sorted."""
        journal = Path(self.environment()["TOY_JOURNAL"])
        lines = journal.read_text(encoding="utf-8").split() if journal.exists() else []
        journal.unlink(missing_ok=True)
        return sorted(lines)

    def edit(self, old: str, new: str, file: str = "params.yaml") -> None:
        """Replace text in a file, which must be there exactly once."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    def clone(self, name: str) -> "Project":
        """Clone the git repository into a folder beside it, with the same DVC remote."""
        self.run("git", "clone", "--quiet", ".", f"../{name}")
        return Project(self.folder.parent / name)

    def assert_up_to_date(self) -> None:
        """Check that both engines find nothing to do, and do nothing."""
        assert "Data and pipelines are up to date." in self.dvc("status")
        assert "Nothing to be done" in self.snakemake("-n")
        self.dvc("repro")
        assert self.ran() == []

    def assert_as_committed(self) -> None:
        """Check that git sees no change: not in dvc.lock, and no file that nobody ignores."""
        assert self.run("git", "status", "--porcelain") == ""


def build(world: Path) -> None:
    """Make the toy project, run it once with Snakemake, commit it and push its data."""
    folder = world / "project"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in REAL_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (world / "remote").mkdir()
    project = Project(folder)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.dvc("remote", "add", "--default", "storage", "../remote")
    project.snakemake()
    assert project.ran() == EVERY_STAGE
    project.run("git", "add", ".")
    project.run("git", "commit", "--quiet", "--message", "toy")
    project.dvc("push", "--run-cache")
