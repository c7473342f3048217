import json
from pathlib import Path

import pytest
import torch
from command_line import llmpress
from tiny_artifacts import calibrate_tiny

from llmpress.calibration.files import load_statistics
from llmpress.calibration.texts import read_texts
from llmpress.core.artifacts import artifact_folder, read_provenance
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.tasks.files import write_items
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.svd import SVD

CPU = torch.device("cpu")


def calibrated(model: Path, out: Path, delta: Path | None = None) -> Path:
    calibrate_tiny(model, out, delta)
    return out


def compressed(delta: Path, calibration: Path, out: Path) -> None:
    compress_delta(
        delta,
        method=SVD(rank=4, whiten=True),
        calibration=calibration,
        seed=0,
        device=CPU,
        scratch=out.parent / "scratch",
        out=out,
    )


def test_a_base_with_its_delta_is_calibrated_as_the_finetuned_model(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tiny_delta: Path, tmp_path: Path
) -> None:
    whole = load_statistics(calibrated(tiny_finetuned_folder, tmp_path / "whole"))
    folder = calibrated(tiny_model_folder, tmp_path / "both", tiny_delta)
    both = load_statistics(folder)
    assert set(both) == set(whole)
    for name in whole:
        expected = whole[name].second_moment
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            both[name].second_moment, expected, rtol=0.02, atol=0.01 * scale
        )  # in bf16, to which sums of fp32 are not rounded as the sum itself is
    assert set(read_provenance(folder)["inputs"]) == {"base", "delta"}
    compressed(tiny_delta, folder, tmp_path / "out")


def test_statistics_of_another_delta_are_refused(
    tiny_model_folder: Path, tiny_delta: Path, tmp_path: Path
) -> None:
    extract_delta(tiny_model_folder, tiny_model_folder, out=tmp_path / "other")
    folder = calibrated(tiny_model_folder, tmp_path / "both", tmp_path / "other")
    with pytest.raises(ArtifactError, match="other"):
        compressed(tiny_delta, folder, tmp_path / "out")


def test_items_of_a_task_are_text(tmp_path: Path) -> None:
    items = [{"query": f"What is {i}?", "target": f" It is {i}."} for i in range(10)]
    write_items(tmp_path / "train.jsonl", items)
    text = read_texts(tmp_path)[tmp_path.name]
    assert list(text.statistics) == [f"What is {i}? It is {i}." for i in range(8)]
    assert list(text.validation) == ["What is 8? It is 8.", "What is 9? It is 9."]
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": "What?"}) + "\n")
    with pytest.raises(SourceError, match="`query` and `target`"):
        read_texts(tmp_path)
    with pytest.raises(ArtifactError, match="none"):
        read_texts(tmp_path / "none")


def test_a_task_is_named_as_text_on_the_command_line(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    task = tmp_path / "sums"
    items = [{"query": f"{i} + {i} =", "target": f" {2 * i} which is even"} for i in range(400)]
    with artifact_folder(task, stage="fetch_task", settings={}, inputs={}) as folder:
        write_items(folder / "train.jsonl", items)
    done = llmpress("calibrate", tiny_model_folder, "--text", task, "--windows", 4, "--length", 64,
                    "-o", tmp_path / "calibration")  # fmt: skip
    assert done.code == 0, done.err
    assert load_statistics(tmp_path / "calibration")
    inputs = read_provenance(tmp_path / "calibration")["inputs"]
    assert inputs["task sums"] == read_provenance(task)["fingerprint"]


@pytest.mark.parametrize("option", [("--text", "text.txt"), ("--sequential",)], ids=" ".join)
def test_text_and_order_need_the_base(
    option: tuple[str, ...], tiny_delta: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("words " * 100)
    given = [tmp_path / part if part.endswith(".txt") else part for part in option]
    done = llmpress("delta", "compress", tiny_delta, "-m", "svd", "--bits", 2, *given,
                    "-o", tmp_path / "out")  # fmt: skip
    assert done.code == 1
    assert f"{option[0].removeprefix('--')}: name the `base` too" in done.err
