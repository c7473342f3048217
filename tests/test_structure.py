"""The tree: which packages there are, what may import what, and what lies where."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/llmpress"
# From the bottom up: a package imports those before it, never those after it.
ORDER = (
    "core",
    "nn",
    "numerics",
    "methods",
    "data",
    "models",
    "calibration",
    "compression",
    "deltas",
    "tuning",
    "training",
    "evaluation",
    "pipeline",
    "export",
    "serving",
    "planning",
    "report",
    "cli",
)
TENSORS_ONLY = ("nn", "numerics", "methods")
NOT_OF_TENSORS = {"transformers", "yaml", "json", "pathlib"}
NEVER = {"snakemake", "dvc"}
MOST_PACKAGES = 18
MOST_LINES = 400
# Files above MOST_LINES and what they may have at most: to be split, never to grow.
LONG: dict[str, int] = {}
# Names of files and keys that one module alone knows; the others ask it.
OWNERS = {
    "adapter_config.json": "models/adapters.py",
    "delta.json": "models/checkpoints/delta_files.py",
    "layers.json": "core/records.py",
    "model.safetensors.index.json": "core/artifacts.py",
    "provenance.json": "core/artifacts.py",
    "spec": "nn/layers/__init__.py",
    "task.yaml": "data/tasks/files.py",
    "train.jsonl": "data/tasks/files.py",
    "training.json": "core/artifacts.py",
    "windows.safetensors": "calibration/files.py",
}
# Tests of more than one package.
TESTS_OF_ALL = {"gpu", "workflow"}
# Names with an underscore that are not llmpress's.
OTHERS_PRIVATE = {"_replace", "_backward_hooks"}
# Private names that tests use, by file: to be removed, never to be added to.
PRIVATE: dict[str, set[str]] = {}
# Upward arrows that are known, file -> module: to be removed, never to be added to.
UPWARD: set[tuple[str, str]] = set()


def strings(file: Path) -> Iterator[str]:
    """Yield every text in a file's code, docstrings apart."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    said = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said:
            yield node.value


def module_name(file: Path) -> str:
    """Return a file's dotted name."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
INSIDE = {name: file for name, file in MODULES.items() if name != "llmpress"}


@cache
def imports(file: Path) -> set[str]:
    """Return the full names of all that a file imports anywhere, for type checking alone too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = file.relative_to(PACKAGE.parent).parts[: -node.level]
                module = ".".join([*here, *([module] if module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return found


def modules_of(name: str) -> Iterator[str]:
    """Yield the module of llmpress that an imported name stands in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    if name:
        yield name


def own_imports(file: Path) -> set[str]:
    """Return the modules of llmpress that a file imports, without the packages on their way."""
    return {module for name in imports(file) for module in modules_of(name)}


def room(module: str) -> str:
    """Return the package directly below llmpress that a module lies in."""
    return module.split(".")[1] if "." in module else ""


def test_every_package_is_known_and_nothing_lies_flat() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == {*ORDER, "__init__.py", "py.typed"}
    assert len(ORDER) <= MOST_PACKAGES


@pytest.mark.parametrize("number", range(len(ORDER)), ids=ORDER)
def test_a_package_says_what_it_is_and_what_it_may_import(number: int) -> None:
    text = (PACKAGE / ORDER[number] / "__init__.py").read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text))
    assert said is not None
    assert said.splitlines()[0].endswith(".")
    below = ORDER[:number]
    if not below:
        assert "Imports no other package of llmpress." in said
    elif len(below) == 1:
        assert f"May import from {below[0]}." in said
    else:
        assert f"May import from {below[0]} up to {below[-1]}." in said


@pytest.mark.parametrize("file", INSIDE.values(), ids=INSIDE)
def test_imports_go_downwards_only(file: Path) -> None:
    ours = ORDER.index(room(module_name(file)))
    theirs = {module for module in own_imports(file) if room(module)}
    name = file.relative_to(PACKAGE).as_posix()
    known = {module for path, module in UPWARD if path == name}
    assert {m for m in theirs if ORDER.index(room(m)) > ours} == known
    # the package itself imports its names when they are asked for: for whoever uses it from above
    assert room(module_name(file)) == "cli" or "llmpress" not in own_imports(file)


@pytest.mark.parametrize("file", MODULES.values(), ids=MODULES)
def test_heavy_packages_stay_outside(file: Path) -> None:
    packages = {name.split(".")[0] for name in imports(file)}
    assert not packages & NEVER
    if room(module_name(file)) in TENSORS_ONLY:
        assert not packages & NOT_OF_TENSORS


def at_the_top(node: ast.AST) -> Iterator[str]:
    """Yield the packages that a module imports when it is imported itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").split(".")[0]
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            yield from at_the_top(child)


@pytest.mark.parametrize("file", MODULES.values(), ids=MODULES)
def test_what_a_module_needs_is_declared(file: Path) -> None:
    """Opening an artifact works where only the declared packages are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = list(project["dependencies"])
    declared += extras["workflow"] if room(module_name(file)) == "report" else []
    declared += extras["serve"] if room(module_name(file)) == "serving" else []
    declared += extras["gpu"] if room(module_name(file)) == "nn" else []
    names = {re.split(r"[<>=!;\[ ]", entry)[0].replace("-", "_").lower() for entry in declared}
    names |= {"yaml", "pydantic_core", "markupsafe", "llmpress", *sys.stdlib_module_names}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert set(at_the_top(tree)) <= names


@pytest.mark.parametrize("name", OWNERS)
def test_one_module_knows_a_file_or_a_key(name: str) -> None:
    knowing = {
        file.relative_to(PACKAGE).as_posix() for file in MODULES.values() if name in strings(file)
    }
    assert knowing == {OWNERS[name]}


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: own_imports(file) - {name} for name, file in INSIDE.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("file", MODULES.values(), ids=MODULES)
def test_a_file_has_one_subject_that_fits(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG.get(file.relative_to(PACKAGE).as_posix(), MOST_LINES)


def test_files_that_were_split_are_no_longer_excused() -> None:
    for name in LONG:
        assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) > MOST_LINES


TESTS = ROOT / "tests"
TEST_FILES = sorted(TESTS.rglob("*.py"))


def private_names(file: Path) -> Iterator[str]:
    """Yield the names with a leading underscore that a test file imports, reads or replaces."""
    names = [name for path in imports(file) if path[:8] == "llmpress" for name in path.split(".")]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [str(a.value) for a in node.args[:2] if isinstance(a, ast.Constant)]
            names += [name for text in texts for name in text.split(".")]
    for name in names:
        if name.startswith("_") and not name.startswith("__") and name not in OTHERS_PRIVATE:
            yield name


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: file.relative_to(TESTS).as_posix())
def test_tests_use_what_is_public(file: Path) -> None:
    assert set(private_names(file)) == PRIVATE.get(file.relative_to(TESTS).as_posix(), set())


def test_tests_lie_where_the_code_lies() -> None:
    folders = {file.parent.relative_to(TESTS) for file in TEST_FILES if file.name[:5] == "test_"}
    others = [
        folder
        for folder in folders
        if folder.parts and folder.parts[0] not in TESTS_OF_ALL and not (PACKAGE / folder).is_dir()
    ]
    assert others == []


def test_every_package_has_a_row_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in ORDER] == list(ORDER)
