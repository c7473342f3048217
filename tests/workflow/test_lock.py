"""The pipeline needs requirements.lock alone, and nothing of what tests and checks use."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import lock

ROOT = Path(__file__).parents[2]
OURS = {"llmpress", *(path.stem for path in (ROOT / "workflow").rglob("*.py"))}
BY_TORCH = {"triton"}  # comes with a torch that has a GPU
NO_STAGE = {"serving", "cli"}  # rooms that no stage imports, see dvc.yaml


def locked(name: str) -> set[str]:
    """Return the canonical names that a lock pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if line[0] != "#"}


def imported(file: Path) -> set[str]:
    """Return the packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ["src", "workflow"])
def test_the_pipeline_imports_what_its_lock_pins(folder: str) -> None:
    pinned, provided = locked("requirements.lock"), packages_distributions()
    files = {f for f in (ROOT / folder).rglob("*.py") if f.parent.parent.name != "peers"}
    files = {f for f in files if not NO_STAGE & {*f.parts}}
    names = set().union(*map(imported, files))
    names -= {*sys.stdlib_module_names, *OURS, *BY_TORCH}
    assert {
        n for n in names if not pinned & {*map(canonicalize_name, provided.get(n, ()))}
    } == set()


def test_each_package_is_pinned_once() -> None:
    assert not locked("requirements.lock") & locked("requirements-dev.lock")


def test_locks_are_what_the_pipeline_needs_and_the_rest() -> None:
    pipeline, rest = lock.locks().values()
    assert "\ntorch==" in pipeline
    assert "\nsetuptools==" in pipeline
    assert "\npytest==" in rest
    assert "\npip==" not in pipeline + rest
    assert "+" not in pipeline + rest
