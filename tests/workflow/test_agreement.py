"""Snakemake and DVC must agree: both commands are the user's, in any order, on any clone.

Real processes of both on a toy project that uses this project's bridge and profile.
"""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from toy_project import EVERY_STAGE, Project

ENGINES = ["snakemake", "dvc"]
AFTER_X = ["compress@x", "evaluate@x", "report"]
BITS = ("method: plain, settings: {bits: 4}", "method: plain, settings: {bits: 8}")

pytestmark = pytest.mark.slow
both_engines = pytest.mark.parametrize("engine", ENGINES)


def touch_everything(folder: Path) -> None:
    """Give all files of a project new times, in random order."""
    files = [f for f in folder.rglob("*") if not {".git", ".dvc", ".snakemake"} & {*f.parts}]
    order = random.Random(0)
    order.shuffle(files)
    for file in files:
        when = time.time() - order.randrange(10_000)
        os.utime(file, (when, when))


def contents(project: Project) -> dict[str, bytes]:
    """Return every output of the pipeline."""
    return {
        file.relative_to(project.folder).as_posix(): file.read_bytes()
        for top in ("data", "results")
        for file in sorted((project.folder / top).rglob("*"))
        if file.is_file() and file.name != ".snakemake_timestamp"
    }


def wait_for(path: Path, seconds: float = 90) -> str:
    """Wait until a file has content and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and (text := path.read_text(encoding="utf-8")):
            return text
        time.sleep(0.05)
    raise TimeoutError(f"{path} did not appear")


def hang(project: Project, stage: str, *command: str) -> tuple[subprocess.Popen[str], int]:
    """Start an engine and return it with the process of ``stage``, which is at work for long."""
    pid_file = project.folder.parent / "pid"
    pid_file.unlink(missing_ok=True)
    engine = project.start(*command, TOY_HANG=stage, TOY_PID=str(pid_file))
    return engine, int(wait_for(pid_file))


def kill_everything(engine: subprocess.Popen[str]) -> None:
    """Kill an engine and all that it started at once, as at a power cut, and see them gone.

    A killed process holds what it locked until someone has waited for it. Its parent is killed too;
    this process takes the parent's place, as not every container's first process does.
    """
    take_orphans = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(take_orphans, 1) == 0
    try:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.communicate(timeout=60)
        with suppress(ChildProcessError):  # none is left
            while True:
                os.waitpid(-engine.pid, 0)
    finally:
        libc.prctl(take_orphans, 0)


def test_snakemake_leaves_nothing_to_do(project: Project) -> None:
    assert list(project.folder.glob("toy/methods/*/__pycache__/*.pyc"))
    project.assert_up_to_date()
    project.assert_as_committed()


def test_dvc_repro_leaves_nothing_to_do(project: Project) -> None:
    expected = contents(project)
    project.edit("seed: 0", "seed: 1")
    project.dvc("repro")
    assert project.ran() == [stage for stage in EVERY_STAGE if stage != "fetch@a"]
    project.edit("seed: 1", "seed: 0")
    project.dvc("repro")
    assert project.ran() == []
    assert contents(project) == expected
    project.assert_up_to_date()
    project.assert_as_committed()


def test_fresh_clone_after_pull_has_nothing_to_do(project: Project) -> None:
    clone = project.clone("clone")
    clone.dvc("pull")
    clone.assert_up_to_date()
    touch_everything(clone.folder)
    clone.assert_up_to_date()
    clone.assert_as_committed()
    assert contents(clone) == contents(project)


@both_engines
def test_one_parameter_runs_its_stages_alone_and_back_runs_none(
    project: Project, engine: str
) -> None:
    expected = contents(project)
    project.edit(*BITS)
    project.engine(engine)
    assert project.ran() == AFTER_X
    assert contents(project) != expected
    project.edit(*reversed(BITS))
    project.engine("snakemake" if engine == "dvc" else "dvc")  # the other one restores
    assert project.ran() == []
    assert contents(project) == expected
    project.assert_up_to_date()
    project.assert_as_committed()


@both_engines
def test_fresh_clone_restores_everything_from_the_remote(project: Project, engine: str) -> None:
    clone = project.clone("clone")
    clone.engine(engine)
    assert clone.ran() == []
    assert contents(clone) == contents(project)
    clone.assert_up_to_date()
    clone.assert_as_committed()


@both_engines
def test_a_teammates_run_of_the_same_edit_is_not_repeated(project: Project, engine: str) -> None:
    clone = project.clone("clone")
    project.edit(*BITS)
    project.dvc("repro")
    assert project.ran() == AFTER_X
    project.dvc("push", "--run-cache")
    clone.edit(*BITS)
    clone.engine(engine)
    assert clone.ran() == ["report"]  # its table lies in Git, of which DVC's remote has nothing
    assert contents(clone) == contents(project)


@both_engines
def test_damaged_outputs_are_restored(project: Project, engine: str) -> None:
    expected = contents(project)
    linked = project.folder / "data/models/b/content.txt"  # a hard link: DVC's cache suffers too
    linked.chmod(0o644)
    linked.write_text("overwritten", encoding="utf-8")
    replaced = project.folder / "results/metrics/y.json"
    replaced.unlink()
    replaced.write_text("{}", encoding="utf-8")
    shutil.rmtree(project.folder / "data/compressed/x")
    project.engine(engine)
    assert contents(project) == expected
    project.ran()
    project.assert_up_to_date()
    project.assert_as_committed()


def test_a_list_of_locks_that_a_killed_job_left_half_written_stops_nobody(
    project: Project,
) -> None:
    project.edit('"plain"', '"better"', file="toy/methods/plain/method.py")
    (project.folder / ".dvc/tmp/rwlock").write_text("", encoding="utf-8")
    project.snakemake()
    assert project.ran() == ["compress@x", "evaluate@x", "report"]


def test_outputs_that_git_keeps_are_made_again(project: Project) -> None:
    shutil.rmtree(project.folder / "results")
    project.snakemake()
    project.ran()
    project.assert_up_to_date()
    project.assert_as_committed()


@both_engines
def test_a_failing_stage_is_named_and_a_rerun_continues(project: Project, engine: str) -> None:
    project.edit('"plain"', '"better"', file="toy/methods/plain/method.py")
    status = 1 if engine == "snakemake" else 255
    printed = project.engine(engine, status=status, TOY_FAIL="evaluate@x")
    assert "the toy broke" in printed
    assert "failed to reproduce 'evaluate@x'" in printed
    if engine == "snakemake":
        assert re.search(r"evaluate@x: failed .*logs/evaluate/x\.log", printed)
        log = project.folder / "logs/evaluate/x.log"
        assert "the toy broke" in log.read_text(encoding="utf-8")
    assert project.ran() == ["compress@x", "evaluate@x"]
    project.engine(engine)
    assert project.ran() == ["evaluate@x", "report"]
    project.assert_up_to_date()


@both_engines
def test_after_a_kill_a_rerun_continues(project: Project, engine: str) -> None:
    project.edit(*BITS)
    command = ["snakemake", "--cores", "2"] if engine == "snakemake" else ["dvc", "repro"]
    process, pid = hang(project, "compress@x", *command)
    os.kill(pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "failed to reproduce 'compress@x'" in printed
    assert project.ran() == ["compress@x"]
    process, _ = hang(project, "evaluate@x", *command)
    kill_everything(process)
    assert project.ran() == ["compress@x", "evaluate@x"]
    project.engine(engine)
    assert project.ran() == ["evaluate@x", "report"]
    project.assert_up_to_date()


def test_a_second_run_is_refused_while_one_is_going_on(project: Project) -> None:
    project.edit(*BITS)
    process, pid = hang(project, "compress@x", "snakemake", "--cores", "2")
    assert "compress" in project.snakemake("-n")
    assert "cannot be locked" in project.snakemake(status=1)
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_comparing_experiments(project: Project) -> None:
    project.dvc("exp", "run", "--name", "eight-bits", "--set-param", "runs.x.settings.bits=8")
    assert project.ran() == AFTER_X
    assert "Nothing to be done" in project.snakemake("-n")
    params = json.loads(project.dvc("params", "diff", "--json"))["params.yaml"]
    assert params == {"runs.x.settings.bits": {"old": 4, "new": 8, "diff": 4}}
    metrics = json.loads(project.dvc("metrics", "diff", "--json"))
    assert list(metrics) == ["results/metrics/x.json"]
    assert metrics["results/metrics/x.json"]["loss"]["diff"] != 0
    assert "results/metrics/y.json" in project.dvc("metrics", "show")
    assert "eight-bits" in project.dvc("exp", "show", "--only-changed", "--csv")
    project.dvc("plots", "show", "--out", "dvc_plots")
    page = (project.folder / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "loss" in page


def test_snakemakes_own_report(project: Project) -> None:
    project.snakemake("--report", "report.zip")
    with zipfile.ZipFile(project.folder / "report.zip") as archive:
        assert any("report.html" in name for name in archive.namelist())


def test_the_remote_is_asked_only_when_there_is_one_and_it_is_wanted(project: Project) -> None:
    job = ["python", "workflow/scripts/dvc_stage.py", "report", "report.log"]
    project.dvc("remote", "modify", "storage", "url", "ssh://nowhere.invalid/data")
    said = r"report: done in \d s"
    assert re.search(said, project.run(*job, LLMPRESS_OFFLINE="1"))
    project.run(*job, status=255)
    project.dvc("remote", "remove", "storage")
    assert "done in" in project.run(*job)
    assert "didn't change" in (project.folder / "report.log").read_text(encoding="utf-8")


def test_the_terminal_tells_of_each_job_and_of_what_is_left(project: Project) -> None:
    project.edit(*BITS)
    printed = project.snakemake("--quiet", "rules", "progress", "host", "reason", "--")
    told = [line.split("  ", 1)[1] for line in printed.splitlines() if "  " in line]
    assert next(line.partition(":")[0] for line in told if "starts" in line) == "compress@x"
    done = [line for line in told if "done in" in line]
    assert re.fullmatch(r"compress@x: done in \d+ s, \d+ s .*; 2 of 3 jobs left, some .+", done[0])
    assert done[-1].startswith("report: done in")
    assert "left" not in done[-1]
