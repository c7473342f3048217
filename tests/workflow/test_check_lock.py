"""Whether dvc.lock records the code that is here."""

from pathlib import Path

import pytest
from toy_project import Project

CHECK = ("python", "workflow/check_lock.py")

pytestmark = pytest.mark.slow


def lock(project: Project) -> Path:
    return project.folder / "dvc.lock"


def test_a_true_lock_passes_and_no_bytecode_counts(project: Project) -> None:
    (project.folder / "toy/methods/plain/__pycache__/other.pyc").write_bytes(b"")
    assert project.run(*CHECK, "--strict") == ""
    assert project.ran() == []


def test_other_code_is_named_by_stage_and_fails_only_when_strict(project: Project) -> None:
    before = lock(project).read_bytes()
    project.edit('"plain"', '"better"', file="toy/methods/plain/method.py")
    for printed in (project.run(*CHECK), project.run(*CHECK, "--strict", status=1)):
        assert printed.splitlines()[:-1] == ["compress@x: toy/methods/plain"]
        assert "1 stages were made by other code, 0 are not recorded" in printed
    assert project.ran() == []
    assert lock(project).read_bytes() == before


def test_stages_that_are_not_recorded_count(project: Project) -> None:
    lock(project).unlink()
    (project.folder / "toy/methods/fancy/method.py").unlink()
    assert "0 stages were made by other code, 8 are not recorded" in project.run(*CHECK)
    project.run(*CHECK, "--strict", status=1)
    project.run("git", "checkout", "--quiet", "dvc.lock")
    assert "compress@y: toy/methods/fancy" in project.run(*CHECK)
