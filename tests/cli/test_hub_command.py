"""``llmpress hub``: there and back, by hand."""

from pathlib import Path

import pytest
from command_line import llmpress
from hub_stand_in import WRITER
from tiny_artifacts import Make

# the client's own way of uploading
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("hub")
def test_push_and_fetch(compressed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    done = llmpress("hub", "push", compressed("rtn"), "team/small", "--json")
    assert done.code == 0, done.err
    assert done.json["repository"] == "team/small"
    done = llmpress("hub", "fetch", "team/small@main", "-o", tmp_path / "back")
    assert done.code == 0, done.err
    assert contents(tmp_path / "back") == contents(compressed("rtn"))
    again = llmpress("hub", "fetch", "team/small@main", "-o", tmp_path / "back")
    assert str(tmp_path / "back") in again.error
    assert "'team/small'" in llmpress("hub", "fetch", "team/small", "-o", tmp_path / "x").error
    assert "team/no" in llmpress("hub", "fetch", "team/no@main", "-o", "x").error


@pytest.mark.usefixtures("hub")
def test_a_model_by_its_hub_name(compressed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert llmpress("hub", "push", compressed("rtn"), "team/small").code == 0
    done = llmpress("generate", "team/small@main", "def f(", "--max-tokens", 4, "--json")
    assert done.code == 0, done.err
    here = llmpress("generate", compressed("rtn"), "def f(", "--max-tokens", 4, "--json")
    assert done.json["text"] == here.json["text"]
