"""Each stage's code dependencies are its script's imports."""

from pathlib import Path

import pytest

import code_deps

ROOT = Path(__file__).parents[2]


def write(root: Path, files: dict[str, str]) -> None:
    """Write a small project."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


SMALL = {
    "src/llmpress/__init__.py": "",
    "src/llmpress/a.py": "from llmpress.sub import b\n",
    "src/llmpress/c.py": "",
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


def test_dvc_yaml_names_exactly_the_code_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = Path("dvc.yaml").read_text(encoding="utf-8")
    assert text == code_deps.rewrite(text), "run python workflow/code_deps.py --write"


def test_closure_follows_packages_functions_relative_imports_and_data(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    assert code_deps.closure(Path("workflow/script.py"), tmp_path) == {
        "src/llmpress/__init__.py",
        "src/llmpress/a.py",
        "src/llmpress/c.py",
        "src/llmpress/late.py",
        "src/llmpress/sub/__init__.py",
        "src/llmpress/sub/b.py",
        "src/llmpress/sub/templates/page.html",
    }


def test_import_of_a_missing_module_is_named(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, "workflow/script.py": "import llmpress.gone\n"})
    with pytest.raises(ValueError, match=r"llmpress\.gone"):
        code_deps.closure(Path("workflow/script.py"), tmp_path)


def test_names_of_the_package_itself_are_refused(tmp_path: Path) -> None:
    script = "from llmpress import load_delta\n"
    write(tmp_path, {**SMALL, "workflow/script.py": script})
    with pytest.raises(ValueError, match=r"script\.py imports load_delta from llmpress"):
        code_deps.closure(Path("workflow/script.py"), tmp_path)


METHODS = {
    "src/llmpress/methods/__init__.py": "",
    "src/llmpress/methods/base.py": "",
    "src/llmpress/methods/one/__init__.py": (
        "from llmpress import c\nfrom llmpress.methods import base\n"
    ),
    "src/llmpress/methods/two/__init__.py": "from llmpress.methods.base import Method\n",
}


def test_rewriting_corrects_the_code_and_keeps_the_rest(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, **METHODS, "workflow/script.py": "import llmpress.methods\n"})
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
        "        - src/llmpress/__init__.py\n        - src/llmpress/c.py\n"
        "        - src/llmpress/methods/${item.method}\n"
        "        - src/llmpress/methods/__init__.py\n        - src/llmpress/methods/base.py\n",
    )
    expected = expected.replace(
        "      - data/x\n",
        "      - workflow/script.py\n      - data/x\n"
        "      - src/llmpress/__init__.py\n      - src/llmpress/methods/__init__.py\n",
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
