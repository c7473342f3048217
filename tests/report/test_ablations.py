"""Ablations: rows are measured once, at the size asked for, and shown on one page."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmpress.core.artifacts import read_json, write_json
from llmpress.core.errors import ArtifactError
from llmpress.core.params import build
from llmpress.evaluation import ablations
from llmpress.evaluation.ablations import Ablation, measured
from llmpress.methods.base import Shape
from llmpress.methods.cluscomp.budget import CodebookSize, true_bits
from llmpress.report.ablations import markdown, write_page

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflow/ablations"
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]


def asked(**rows: dict[str, Any]) -> Ablation:
    question = {
        "key": "size",
        "title": "K <against> d",
        "measure": "layers",
        "base": {
            "bits": 4.0,
            "allocation": "uniform",
            "iterations": 2,
            "codebook_dtype": "float16",
        },
        "rows": rows,
        "finding": "Longer is better.",
    }
    values = {"title": "T", "method": "cluscomp", "model": "tiny", "layers": LAYERS}
    return build(Ablation, {**values, "questions": [question]}, "cluscomp")


@pytest.fixture
def data(tmp_path: Path, tiny_model_folder: Path, calibration: Path) -> Path:
    for kind, folder in (("models", tiny_model_folder), ("calibration", calibration)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        (tmp_path / "data" / kind / "tiny").symlink_to(folder)
    return tmp_path / "data"


def test_rows_are_measured_once_and_again_when_their_settings_change(
    data: Path, tmp_path: Path
) -> None:
    cache, absent = tmp_path / "rows.json", tmp_path / "absent"  # nothing is measured there
    first = measured(asked(one={"vector_size": 1}, two={"vector_size": 2}), cache, data)["size"]
    assert [row["label"] for row in first] == ["one", "two"]
    for row in first:
        assert 2.5 < row["bits"] <= 4.0
        assert 0 < row["error"] < 0.5
        assert set(row["errors"]) == set(LAYERS)
    asked_again = asked(renamed={"vector_size": 1}, two={"vector_size": 2})
    again = measured(asked_again, cache, absent)["size"]
    assert [{**row, "label": ""} for row in again] == [{**row, "label": ""} for row in first]
    with pytest.raises(ArtifactError, match=str(absent)):
        measured(asked(one={"vector_size": 3}), cache, absent)


def test_rows_of_another_calibration_are_measured_again_and_unasked_ones_dropped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "rows.json"
    measured(asked(one={"vector_size": 1}, two={"vector_size": 2}), cache, data)
    write_json(cache, {key: {**row, "error": -1.0} for key, row in read_json(cache).items()})
    measured(asked(two={"vector_size": 2}), cache, data)
    (row,) = read_json(cache).values()
    assert row["varied"] == {"vector_size": 2}
    assert row["error"] == -1.0
    assert set(row["inputs"]) == {"models/tiny", "calibration/tiny"}
    monkeypatch.setattr(ablations, "fingerprint", lambda folder: f"new {folder.name}")
    (row,) = measured(asked(two={"vector_size": 2}), cache, data)["size"]
    assert row["error"] > 0
    assert set(row["inputs"].values()) == {"new tiny"}


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("d", [1, 2, 4, 7])
def test_the_largest_codebook_that_fits_is_taken(d: int, bits: float) -> None:
    shape = Shape(64, 176)
    settings = {"bits": bits, "vector_size": d, "scaled": False, "codebook_dtype": "float16"}
    found = ablations.with_largest_codebook(settings, shape)["num_entries"]
    sizes = [true_bits(shape, CodebookSize(K, d), scaled=False) for K in range(1, 70000)]
    fitting = [K for K, size in enumerate(sizes, start=1) if size <= bits and K <= 1 << 16]
    assert found == max([2, *fitting])


def test_the_page_is_self_contained_and_escapes_names(data: Path, tmp_path: Path) -> None:
    ablation = asked(one={"vector_size": 1}, **{"<two>": {"vector_size": 2}})
    rows = measured(ablation, tmp_path / "rows.json", data)
    page = tmp_path / "page.html"
    write_page(ablation, rows, FOLDER / "page.html.j2", page)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "<script" not in text
    assert "K &lt;against&gt; d" in text
    assert "&lt;two&gt;" in text
    assert "Longer is better." in text
    assert "| one |" in markdown(ablation, rows)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_pages_of_the_project_are_known_without_measuring(file: Path, tmp_path: Path) -> None:
    ablation = build(Ablation, yaml.safe_load(file.read_text(encoding="utf-8")), file.stem)
    rows = measured(ablation, file.with_suffix(".rows.json"), tmp_path / "absent")
    write_page(ablation, rows, FOLDER / "page.html.j2", tmp_path / "page.html")
    documented = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    assert markdown(ablation, rows).strip() in documented
