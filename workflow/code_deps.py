"""Keep the code dependencies in dvc.yaml equal to what each stage's script really imports.

A stage depends on its script and on what the script imports of ``llmpress``, directly or through
others, at the top of a file or inside a function, with the packages' data files. Imports for type
checking alone do not count, nor do files that hold nothing but a docstring; a name of the package
itself, imported when it is asked for, counts as the module it stands in, and the file that says
which does not count: naming one more thing there changes no stage. That closure is rounded up
to folders: a package of which a stage needs more than one part counts whole, as each entry stands
in dvc.lock once for each run. A stage that loads the method named in params.yaml depends on the
folder ``methods/${item.method}`` and on what any of the methods imports.

    python workflow/code_deps.py --check    # exit status 1 when dvc.yaml differs
    python workflow/code_deps.py --write    # correct dvc.yaml
"""

import argparse
import ast
import difflib
import io
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

SOURCE = Path("src")
PACKAGE = SOURCE / "llmpress"
METHODS = PACKAGE / "methods"
METHOD_TEMPLATE = "src/llmpress/methods/${item.method}"
CODE_FOLDERS = ("src/", "workflow/scripts/")
NOT_DATA = {".py", ".pyc", ".so", ".typed"}
NEVER_WHOLE = (PACKAGE, METHODS)


def closure(script: Path, root: Path = Path()) -> set[str]:
    """Return the files in ``src`` that importing or running ``script`` may execute or read.

    Args:
        script: A Python file, relative to ``root``.
        root: The project's folder.

    Returns:
        Paths relative to ``root``, without the script itself.

    Raises:
        ValueError: A module of ``llmpress`` is imported that does not exist, or from the package
            itself a name that it does not have.
    """
    todo, seen = [script], set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += _imported_files(file, root)
    packages = {f.parent for f in seen if f.name == "__init__.py"}
    seen = {f for f in seen if not _only_says(root / f)}
    data = {
        f.relative_to(root)
        for package in packages
        for f in (root / package).rglob("*")
        if f.is_file() and f.suffix not in NOT_DATA and _package_of(f) == root / package
    }
    return {f.as_posix() for f in (seen | data) - {script, PACKAGE / "__init__.py"}}


def rounded(files: set[Path], folder: Path = PACKAGE) -> set[Path]:
    """Return ``files`` below ``folder`` with every package of which several parts are needed whole.

    Args:
        files: Paths relative to the project's folder.
        folder: Where to begin.
    """
    below = {file for file in files if folder in file.parents}
    parts = {file for file in below if file.parent == folder}
    for name in {file.relative_to(folder).parts[0] for file in below - parts}:
        parts |= rounded(below, folder / name)
    return parts if len(parts) <= 1 or folder in NEVER_WHOLE else {folder}


def code_dependencies(template: dict[str, Any], root: Path = Path()) -> list[str]:
    """Return the code that a stage of dvc.yaml should depend on, its script first.

    Args:
        template: A stage's definition, of a ``foreach`` group what stands below ``do``.
        root: The project's folder.

    Raises:
        ValueError: A method imports another one.
    """
    script = next(word for word in template["cmd"].split() if word.endswith(".py"))
    files = {Path(file) for file in closure(Path(script), root)}
    if METHOD_TEMPLATE in template["deps"]:
        packages = {m.parent for m in (root / METHODS).glob("*/__init__.py")}
        names = [f.relative_to(root) for package in packages for f in package.rglob("*.py")]
        for name in sorted(names):
            own = name.relative_to(METHODS).parts[0]
            imported = {Path(file) for file in closure(name, root)}
            inside = {f for f in imported if METHODS in f.parents and f.parent != METHODS}
            if others := {f for f in inside if f.relative_to(METHODS).parts[0] != own}:
                raise ValueError(
                    f"{name} imports {', '.join(sorted(map(str, others)))}: a run depends on the "
                    "package of its own method alone, so move what they share out of methods/"
                )
            files |= imported - inside
        files.add(Path(METHOD_TEMPLATE))
    return [script, *sorted(path.as_posix() for path in rounded(files))]


def rewrite(text: str, root: Path = Path()) -> str:
    """Return dvc.yaml's ``text`` with the code dependencies put right and all else kept."""
    yaml = YAML()
    yaml.width = 200
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text)
    for definition in content["stages"].values():
        template = definition.get("do", definition)
        script, *library = code_dependencies(template, root)
        data = [p for p in template["deps"] if p != script and not p.startswith(CODE_FOLDERS)]
        # Changed in place: the comments and the blank line after the list hang on it.
        template["deps"][:] = [script, *data, *library]
    out = io.StringIO()
    yaml.dump(content, out)
    return out.getvalue()


@cache
def _imported_files(file: Path, root: Path) -> list[Path]:
    tree = ast.parse((root / file).read_text(encoding="utf-8"), filename=str(file))
    found: list[Path] = []
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += _files_of(alias.name, root)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            found += _files_of(module, root)
            for alias in node.names:
                if module.split(".")[0] != "llmpress":
                    continue
                if _module_file(f"{module}.{alias.name}", root):
                    found += _files_of(f"{module}.{alias.name}", root)
                elif module == "llmpress":
                    found += _files_of(_where(alias.name, file, root), root)
        elif (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == "llmpress"
            and not _module_file(f"llmpress.{node.attr}", root)
        ):
            found += _files_of(_where(node.attr, file, root), root)
    return found


def _where(name: str, file: Path, root: Path) -> str:
    """Return the module that a name of the package itself stands in, as its ``_WHERE`` says."""
    tree = ast.parse((root / SOURCE / "llmpress/__init__.py").read_text(encoding="utf-8"))
    tables = [
        n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets) == "_WHERE"
    ]
    where = ast.literal_eval(tables[0].value) if tables else {}
    if name not in where:
        raise ValueError(f"{file} takes {name} from llmpress, which has no such name")
    return str(where[name])


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out the bodies of ``if TYPE_CHECKING``."""
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _executed(child)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """Return the module of a ``from ... import``, relative ones resolved against ``file``."""
    if not node.level:
        return node.module or ""
    package = file.relative_to(SOURCE).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _files_of(module: str, root: Path) -> list[Path]:
    """Return the file of a module of llmpress and those of the packages it lies in."""
    parts = module.split(".")
    if parts[0] != "llmpress":
        return []
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    files = [_module_file(name, root) for name in names]
    if None in files:
        raise ValueError(f"module {names[files.index(None)]} is imported and does not exist")
    return [file for file in files if file]


def _module_file(module: str, root: Path) -> Path | None:
    base = SOURCE.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if (root / file).is_file():
            return file
    return None


@cache
def _only_says(file: Path) -> bool:
    """Tell whether a Python file holds nothing but a docstring, so that nothing depends on it."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body)


def _package_of(file: Path) -> Path:
    return next(p for p in file.parents if (p / "__init__.py").is_file() or p == p.parent)


def main() -> int:
    """Check or correct ./dvc.yaml and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="only tell whether dvc.yaml is right")
    what.add_argument("--write", action="store_true", help="correct dvc.yaml")
    arguments = parser.parse_args()
    file = Path("dvc.yaml")
    old = file.read_text(encoding="utf-8")
    new = rewrite(old)
    if arguments.write:
        file.write_text(new, encoding="utf-8")
        return 0
    if old != new:
        sys.stdout.writelines(
            difflib.unified_diff(old.splitlines(True), new.splitlines(True), "dvc.yaml", "right")
        )
        print("dvc.yaml: code dependencies differ; run python workflow/code_deps.py --write")
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
