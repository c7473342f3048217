"""Studies are whole pipelines, the root's DVC leaves them alone, and tables show their results."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from llmpress.core.params import read_params
from llmpress.pipeline.params import check_params

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("studies/*/params.yaml"))
SHARED = (".dvc", ".dvcignore", "Snakefile", "dvc.yaml", "profiles", "src", "workflow")
TABLES: dict[str, Any] = runpy.run_path(str(ROOT / "docs/tables.py"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_is_the_pipeline_with_other_params(study: Path) -> None:
    check_params(read_params(study / "params.yaml"))
    assert {name: str((study / name).readlink()) for name in SHARED} == {
        name: f"../../{name}" for name in SHARED
    }
    assert (study / "data/tasks/.gitkeep").is_file()
    assert Repo(study).index.stages
    assert f"[{study.name}]({study.name}/params.yaml)" in (ROOT / "studies/README.md").read_text()


def test_the_root_does_not_start_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert STUDIES
    monkeypatch.chdir(ROOT)
    assert {stage.path_in_repo for stage in Repo().index.stages} == {"dvc.yaml"}


def test_tables_of_the_documentation_are_their_results() -> None:
    pages = [path for pattern in TABLES["PAGES"] for path in ROOT.glob(pattern)]
    different = [p for p in pages if TABLES["filled"](p.read_text()) != p.read_text()]
    assert different == [], "run python docs/tables.py --write"


PAGE = """Before.
<!-- table: rows.csv
columns:
  "": "{label}"
  bits: "{true-bits:.1f}"
  perplexity: "{wiki:.1f} ± {error:.1f}"
rows: {two: the second, one: the first}
-->
old
<!-- /table -->
After.
"""
ROWS = "name,true-bits,wiki,error\none,3.04,20,1\ntwo,2.96,30,\n"


def test_a_table_has_its_rows_in_order_and_its_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    page = TABLES["filled"](PAGE, tmp_path)
    assert page == PAGE.replace(
        "old\n",
        "|  | bits | perplexity |\n| --- | --- | --- |\n"
        "| the second | 3.0 |  |\n| the first | 3.0 | 20.0 ± 1.0 |\n",
    )
    assert TABLES["filled"](page, tmp_path) == page


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (None, "rows.csv"),
        (ROWS.replace("two", "three"), "two"),
        (ROWS.replace("wiki", "w"), "wiki"),
    ],
    ids=["no-results", "no-row", "no-column"],
)
def test_a_table_without_its_results_is_an_error(
    tmp_path: Path, rows: str | None, named: str
) -> None:
    if rows is not None:
        (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(ValueError, match=named):
        TABLES["filled"](PAGE, tmp_path)


def test_a_table_of_two_files_is_sorted_and_takes_what_a_row_has(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "peers.csv").write_text("name,true-bits,perplexity\npeer,3,25\n")
    page = PAGE.replace("rows.csv", "rows.csv peers.csv")
    page = page.replace('"{wiki:.1f} ± {error:.1f}"', '["{wiki:.1f} ± {error:.1f}", "{wiki:.1f}"]')
    page = page.replace(
        "rows: {two: the second, one: the first}",
        "same: {wiki: perplexity}\nsort: true-bits\nrows: {one: first, peer: theirs, two: second}",
    )
    table = TABLES["filled"](page, tmp_path).splitlines()[-5:-2]
    assert table == [
        "| second | 3.0 | 30.0 |",
        "| theirs | 3.0 | 25.0 |",
        "| first | 3.0 | 20.0 ± 1.0 |",
    ]
