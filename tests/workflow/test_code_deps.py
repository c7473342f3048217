"""Each stage's code dependencies are its script's imports."""

import re
from pathlib import Path

import pytest
import yaml

import code_deps

ROOT = Path(__file__).parents[2]


def write(root: Path, files: dict[str, str]) -> None:
    """Write a small project."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


SMALL = {
    "src/llmpress/__init__.py": "NAME = 1\n",
    "src/llmpress/a.py": "from llmpress.sub import b\n",
    "src/llmpress/c.py": "NAME = 1\n",
    "src/llmpress/unused.py": "",
    "src/llmpress/typed.py": "",
    "src/llmpress/late.py": "from . import c\n",
    "src/llmpress/sub/__init__.py": "NAME = 1\n",
    "src/llmpress/sub/b.py": "def f():\n    import llmpress.late\n",
    "src/llmpress/sub/templates/page.html": "",
    "workflow/script.py": (
        "import json\nfrom typing import TYPE_CHECKING\nfrom llmpress.a import thing\n"
        "if TYPE_CHECKING:\n    from llmpress.typed import T\n"
    ),
}
MOST_ENTRIES = 155  # of code, in all of dvc.yaml: each stands in dvc.lock once for each run


def test_dvc_yaml_names_exactly_the_code_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path("dvc.yaml").read_text(encoding="utf-8")
    assert text == code_deps.rewrite(text), "run python workflow/code_deps.py --write"
    assert 0 < len(re.findall("- (?:src|workflow)/", text)) <= MOST_ENTRIES


@pytest.mark.parametrize("package", ["cli", "export", "planning", "report", "serving"])
def test_what_shows_plans_or_serves_reruns_no_stage_that_computes(package: str) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    folder = f"src/llmpress/{package}"
    assert (ROOT / folder).is_dir()
    depending = {
        name
        for name, definition in stages.items()
        if any(
            f"{path}/".startswith(f"{folder}/") for path in definition.get("do", definition)["deps"]
        )
    }
    assert depending <= {"report"}


def test_closure_follows_packages_functions_relative_imports_and_data(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    assert code_deps.closure(Path("workflow/script.py"), tmp_path) == {
        "src/llmpress/a.py",
        "src/llmpress/c.py",
        "src/llmpress/late.py",
        "src/llmpress/sub/__init__.py",
        "src/llmpress/sub/b.py",
        "src/llmpress/sub/templates/page.html",
    }


def test_a_file_that_only_says_what_it_is_counts_for_nothing(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, "src/llmpress/c.py": '"""What lies here."""\n'})
    found = code_deps.closure(Path("workflow/script.py"), tmp_path)
    assert "src/llmpress/c.py" not in found
    assert "src/llmpress/late.py" in found


def test_several_parts_of_a_package_are_the_whole_package() -> None:
    package, methods = code_deps.PACKAGE, code_deps.METHODS
    few = {package / name for name in ("__init__.py", "a/sub/x.py", "b.py", "c.py")}
    assert code_deps.rounded(few) == few  # never the package of everything
    sub = {package / "a/sub" / name for name in ("x.py", "y.py")}
    assert code_deps.rounded(sub) == {package / "a/sub"}
    assert code_deps.rounded({package / "a/x.py", *sub}) == {package / "a"}
    base = {methods / name for name in ("base.py", "registry.py", "more.py")}
    assert code_deps.rounded(base) == base  # nor all methods


def test_a_run_adds_few_entries_to_the_lock() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    code = [
        dep
        for stage in stages.values()
        for dep in stage.get("do", stage).get("deps", ())
        if str(dep).startswith(("src/", "workflow/"))
    ]
    assert len(code) <= 140


def test_import_of_a_missing_module_is_named(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, "workflow/script.py": "import llmpress.gone\n"})
    with pytest.raises(ValueError, match=r"llmpress\.gone"):
        code_deps.closure(Path("workflow/script.py"), tmp_path)


@pytest.mark.parametrize(
    "script", ["from llmpress import thing\n", "import llmpress\nllmpress.thing()\n"]
)
def test_a_name_of_the_package_is_the_module_it_stands_in(script: str, tmp_path: Path) -> None:
    package = '_WHERE = {"thing": "llmpress.sub.b"}\n'
    write(tmp_path, {**SMALL, "src/llmpress/__init__.py": package, "workflow/script.py": script})
    found = code_deps.closure(Path("workflow/script.py"), tmp_path)
    assert "src/llmpress/sub/b.py" in found
    assert "src/llmpress/late.py" in found  # which that module imports
    assert "src/llmpress/a.py" not in found


def test_names_that_the_package_does_not_have_are_refused(tmp_path: Path) -> None:
    script = "from llmpress import load_delta\n"
    write(tmp_path, {**SMALL, "workflow/script.py": script})
    with pytest.raises(ValueError, match=r"script\.py takes load_delta"):
        code_deps.closure(Path("workflow/script.py"), tmp_path)


METHODS = {
    "src/llmpress/methods/__init__.py": '"""Methods."""\n',
    "src/llmpress/methods/base.py": "NAME = 1\n",
    "src/llmpress/methods/one/__init__.py": (
        "from llmpress import c\nfrom llmpress.methods import base\n"
    ),
    "src/llmpress/methods/two/__init__.py": "from llmpress.methods.base import Method\n",
}


def test_rewriting_corrects_the_code_and_keeps_the_rest(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, **METHODS, "workflow/script.py": "import llmpress.sub.b\n"})
    text = """\
# what this is
stages:
  make:
    foreach: ${runs}
    do:
      cmd: python workflow/script.py ${key} # a remark
      deps:
        - workflow/script.py
        - src/llmpress/gone.py
        - data/models/${item.model}
        - src/llmpress/methods/${item.method}
      params:
        - runs.${key}

  after:
    cmd: python workflow/script.py
    deps:
      - data/x
    outs:
      - data/y
"""
    expected = text.replace("        - src/llmpress/gone.py\n", "").replace(
        "        - src/llmpress/methods/${item.method}\n",
        "        - src/llmpress/c.py\n"
        "        - src/llmpress/late.py\n"
        "        - src/llmpress/methods/${item.method}\n"
        "        - src/llmpress/methods/base.py\n        - src/llmpress/sub\n",
    )
    expected = expected.replace(
        "      - data/x\n",
        "      - workflow/script.py\n      - data/x\n"
        "      - src/llmpress/c.py\n"
        "      - src/llmpress/late.py\n      - src/llmpress/sub\n",
    )
    assert code_deps.rewrite(text, tmp_path) == expected


def test_a_method_that_imports_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, **METHODS, "workflow/script.py": ""})
    write(
        tmp_path,
        {"src/llmpress/methods/two/__init__.py": "from llmpress.methods.one import helper\n"},
    )
    template = {"cmd": "python workflow/script.py x", "deps": [code_deps.METHOD_TEMPLATE]}
    with pytest.raises(ValueError, match=r"two/.* imports .*one/"):
        code_deps.code_dependencies(template, tmp_path)
