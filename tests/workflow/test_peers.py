"""Other tools as runs: what they make is evaluated like a run, and a failing one is one line."""

import json
import os
import runpy
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmpress.core.artifacts import artifact_folder
from llmpress.core.errors import SourceError
from llmpress.evaluation.stage import evaluate_model
from llmpress.evaluation.subjects import find_subject
from llmpress.models.checkpoints.files import copy_companions
from llmpress.models.loading import load_model
from llmpress.pipeline.peers import Tool, run_peer

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "workflow/peers"
ENTRY: dict[str, Any] = {
    "tool": "block_removal", "model": "tiny", "settings": {"reduction": 0.45, "windows": 4},
}  # fmt: skip


@pytest.fixture
def project(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and token windows."""
    monkeypatch.chdir(tmp_path)
    with artifact_folder(
        Path("data/models/tiny"), stage="fetch_model", settings={}, inputs={}
    ) as folder:
        copy_companions(tiny_model_folder, folder)
        for file in tiny_model_folder.glob("*.*"):
            (folder / file.name).write_bytes(file.read_bytes())
    with artifact_folder(
        Path("data/calibration/tiny"), stage="calibrate", settings={}, inputs={}
    ) as folder:
        windows = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(0))
        save_file({"calibration": windows}, folder / "windows.safetensors")
    return tmp_path


def peer(tool: Path, **settings: Any) -> None:
    run_peer(
        tool,
        model=Path("data/models/tiny"),
        calibration=Path("data/calibration/tiny"),
        settings=settings,
        out=Path("data/peers/run"),
        environments=Path("build/peers"),
    )


def write_tool(folder: Path, script: str, requirements: str | None = None) -> Path:
    folder.mkdir()
    (folder / "run.py").write_text(script, encoding="utf-8")
    if requirements is not None:
        (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
    return folder


def test_every_tool_has_a_folder() -> None:
    assert {*typing.get_args(Tool)} == {folder.parent.name for folder in PEERS.glob("*/run.py")}


@pytest.mark.slow
def test_removed_blocks_are_evaluated_like_a_run(project: Path) -> None:
    params = {"peers": {"blocks": ENTRY}, "evaluation": {"models": ["tiny"]}}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    script = ROOT / "workflow/scripts/peer.py"
    subprocess.run(
        [sys.executable, script, "blocks"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    subject = find_subject(params, "blocks")
    made = json.loads((subject.folder / "peer.json").read_text(encoding="utf-8"))
    assert len(made["removed"]) == 1
    dense = load_model(subject.folder)
    assert dense.config.num_hidden_layers == 2
    assert "model.layers.2.mlp.up_proj.weight" not in load_file(
        subject.folder / "model.safetensors"
    )

    text = project / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    numbers, details = evaluate_model(
        subject.folder, original=subject.original_folder, text=[text], windows=2, length=32
    )
    assert (details.kind, details.method) == ("peer", "block_removal")
    assert details.settings["reduction"] == 0.45
    assert numbers.size.bits_per_weight == pytest.approx(16 * 2 / 3)
    assert numbers.size.model_bytes == made["model_bytes"] < 2 * made["model_weights"]
    assert numbers.quality.kl_divergence_nats["text.txt"] > 0
    assert numbers.cost.compress_seconds == pytest.approx(made["seconds"])


@pytest.mark.parametrize(
    ("script", "requirements", "says"),
    [
        ("raise SystemExit('error: no such bits')", None, "mine failed: error: no such bits"),
        ("1 / 0", None, "mine failed: ZeroDivisionError"),
        ("", "no-such-package-of-llmpress==1\n", "requirements.txt"),
    ],
    ids=["refuses", "breaks", "not-installed"],
)
def test_a_tool_that_fails_is_one_line_and_leaves_nothing(
    script: str, requirements: str | None, says: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("llmpress.pipeline.peers.PIP", "pip")
    tool = write_tool(project / "mine", script, requirements)
    with pytest.raises(SourceError, match=says) as caught:
        peer(tool)
    assert "\n" not in str(caught.value)
    assert not (project / "data/peers/run").exists()
    assert [*(project / "build/peers").glob("packed-*")] == []


@pytest.mark.usefixtures("project")
def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SourceError, match="reductions"):
        peer(PEERS / "block_removal", reduction=0.2, reductions=0.2)


@pytest.mark.slow
def test_an_environment_is_made_once_and_again_when_its_requirements_change(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("llmpress.pipeline.peers.PIP", "pip")
    where = project / "where.txt"
    script = f"import sys; open({str(where)!r}, 'a').write(sys.prefix + chr(10)); sys.exit(1)"
    tool = write_tool(project / "mine", script, "# nothing\n")
    mark = project / "build/peers/mine/mark"
    for requirements, kept in (("# nothing\n", False), ("# nothing\n", True), ("# new\n", False)):
        (tool / "requirements.txt").write_text(requirements, encoding="utf-8")
        with pytest.raises(SourceError, match="mine failed"):
            peer(tool)
        assert mark.exists() == kept
        mark.write_text("", encoding="utf-8")
    assert set(where.read_text().split()) == {str(project / "build/peers/mine")}


def test_codes_in_words_and_levels_in_groups() -> None:
    common = runpy.run_path(str(PEERS / "common.py"))
    words = torch.tensor([[0b111_010_001, 0, 0]], dtype=torch.int32)
    codes = common["unpack_words"](words, 3)
    assert codes.shape == (1, 32)
    assert codes[0, :3].tolist() == [1, 2, 7]
    common["check_levels"]({"layer": torch.tensor([[0.0, 1, 0, 1]])}, 1, 4)
    with pytest.raises(SystemExit, match="layer: 3 values"):
        common["check_levels"]({"layer": torch.tensor([[0.0, 1, 2, 1]])}, 1, 4)
