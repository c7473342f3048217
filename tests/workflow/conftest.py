"""The toy project, built once and copied for each test."""

import subprocess
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from toy_project import Project, build


@pytest.fixture(scope="session")
def built_world(shared_folder: Path) -> Path:
    """Return a folder with the finished toy project and its remote; never to be changed."""
    world = shared_folder / "toy-world"
    with FileLock(shared_folder / "toy-world.lock"):
        if not world.exists():
            unfinished = Path(tempfile.mkdtemp(dir=shared_folder))
            build(unfinished)
            unfinished.rename(world)
    return world


@pytest.fixture
def project(built_world: Path, tmp_path: Path) -> Project:
    """Return a copy of the finished toy project, to be changed freely."""
    subprocess.run(["cp", "-a", f"{built_world}/.", str(tmp_path)], check=True)  # keeps hard links
    return Project(tmp_path / "project")
