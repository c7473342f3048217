"""Per-block checkpoints belong to exactly one computation."""

import contextlib
import sys
import types
from pathlib import Path

import pytest
import torch

from llmpress.core import resume
from llmpress.core.artifacts import read_json, write_json
from llmpress.core.environment import packages
from llmpress.core.errors import ArtifactError, NumericalError
from llmpress.core.resume import BlockStore

Caplog = pytest.LogCaptureFixture


def test_a_finished_block_comes_back(tmp_path: Path) -> None:
    store = BlockStore("task", {"bits": 3}, tmp_path)
    tensor = torch.arange(6).view(2, 3).t()  # not contiguous
    store.save(4, {"codes": tensor}, {"loss": 0.5})
    found = BlockStore("task", {"bits": 3}, tmp_path).load(4)
    assert found is not None
    torch.testing.assert_close(found[0]["codes"], tensor)
    assert found[1] == {"loss": 0.5}
    assert store.load(3) is None


def test_seconds_of_the_process_before_count(tmp_path: Path) -> None:
    store = BlockStore("task", {}, tmp_path)
    for name, seconds in (("a", 1000.0), ("b", 2000.0)):
        store.save(name, {}, None)
        seal = store.folder / f"{name}.json"
        write_json(seal, {**read_json(seal), "seconds": seconds})
    again = BlockStore("task", {}, tmp_path)
    assert again.seconds() < 1000
    for name in ("b", "a"):
        assert again.load(name) is not None
    assert 2000 <= again.seconds() < 3000
    again.drop("a")
    assert again.load("a") is None


def test_other_settings_never_see_it(tmp_path: Path) -> None:
    BlockStore("task", {"bits": 3}, tmp_path).save(0, {}, {})
    assert BlockStore("task", {"bits": 4}, tmp_path).load(0) is None
    assert BlockStore("other", {"bits": 3}, tmp_path).load(0) is None


def test_tensors_without_a_record_do_not_count(tmp_path: Path) -> None:
    store = BlockStore("task", {}, tmp_path)
    store.save(0, {"x": torch.ones(1)}, {})
    (store.folder / "0000.json").unlink()
    assert store.load(0) is None


def test_clear_removes_older_settings_of_the_same_task_only(tmp_path: Path) -> None:
    old, new = BlockStore("task", {"bits": 3}, tmp_path), BlockStore("task", {"bits": 4}, tmp_path)
    other = BlockStore("task-2", {}, tmp_path)
    for store in (old, new, other):
        store.save(0, {}, {})
    new.clear()
    assert old.load(0) is None
    assert other.load(0) is not None


def test_a_damaged_checkpoint_is_computed_again(tmp_path: Path) -> None:
    store = BlockStore("task", {"a": 1}, tmp_path)
    store.save(0, {"x": torch.arange(4.0)}, ["record"])
    assert store.load(0) is not None
    for name in ("0000.safetensors", "0000.json"):
        path = store.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + b"!!")
        assert store.load(0) is None
        path.write_bytes(whole)
    assert store.load(0) is not None


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (None, False),
        (NumericalError("NaN"), False),
        (ValueError("bits"), False),
        (KeyboardInterrupt(), True),
        (OSError("full"), True),
        (ArtifactError("damaged input"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_continued_is_kept(
    error: BaseException | None, kept: bool, tmp_path: Path
) -> None:
    root = tmp_path / "scratch"
    with contextlib.suppress(BaseException), BlockStore("task", {}, root) as store:
        store.save(0, {"x": torch.zeros(1)}, None)
        if error is not None:
            raise error
    assert root.exists() == kept
    assert (BlockStore("task", {}, root).load(0) is not None) == kept


def begin(task: str, decided_by: dict[str, object], root: Path, caplog: Caplog) -> str:
    """Enter a store as a computation does, and return what it says."""
    caplog.clear()
    with contextlib.suppress(KeyboardInterrupt), BlockStore(task, decided_by, root):
        raise KeyboardInterrupt
    assert all(record.levelname == "WARNING" for record in caplog.records)
    return "\n".join(caplog.messages)


BEFORE = {"model": "a" * 64, "seed": 0, "bits": 3.0, "nested": {"epochs": 4}}


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({**BEFORE, "bits": 2.5}, "bits 3.0, now 2.5"),
        ({**BEFORE, "model": "b" * 64}, "another model"),
        ({**BEFORE, "seed": 1, "nested": {"epochs": 8}}, "nested.epochs 4, now 8; seed 0, now 1"),
        ({**BEFORE, "loss": "mse"}, "loss null, now mse"),
    ],
    ids=["setting", "weights", "seed and nested", "new setting"],
)
def test_what_is_different_is_said(
    now: dict[str, object], reason: str, tmp_path: Path, caplog: Caplog
) -> None:
    assert begin("task", BEFORE, tmp_path, caplog) == ""
    BlockStore("task", BEFORE, tmp_path).save(0, {}, {})
    said = begin("task", now, tmp_path, caplog)
    assert said.startswith(f"task: starts anew, as the 1 finished blocks in {tmp_path}/task@")
    assert f"of other work ({reason});" in said
    assert begin("other", now, tmp_path, caplog) == ""


def test_where_it_continues_is_said(tmp_path: Path, caplog: Caplog) -> None:
    store = BlockStore("task", BEFORE, tmp_path)
    for index in (0, 1, 9999):  # the last is no block
        store.save(index, {}, {})
    said = begin("task", BEFORE, tmp_path, caplog)
    assert said == f"task: continues after 2 finished blocks, which are read from {store.folder}"


def test_other_code_and_packages_are_refused_and_named(
    tmp_path: Path, caplog: Caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, code: str) -> None:
        module = types.ModuleType(f"llmpress.{name}")
        module.__file__ = str(tmp_path / f"{name}.py")
        Path(module.__file__).write_text(code, encoding="utf-8")
        monkeypatch.setitem(sys.modules, module.__name__, module)

    load("tuning", "before")
    store = BlockStore("task", {}, tmp_path)
    store.save(0, {}, {})
    load("tuning", "edited")
    load("new", "new")
    monkeypatch.setattr(resume, "packages", lambda: {**packages(), "torch": "9.9"})
    assert BlockStore("task", {}, tmp_path).load(0) is None
    said = begin("task", {}, tmp_path, caplog)
    assert (
        f"torch {packages()['torch']}, now 9.9; code of {tmp_path}/new.py, {tmp_path}/tuning.py)"
        in said
    )
    (store.folder / "state.json").write_text("{", encoding="utf-8")
    assert "(its record is damaged)" in begin("task", {}, tmp_path, caplog)


def test_names_with_brackets_are_names(tmp_path: Path, caplog: Caplog) -> None:
    BlockStore("a[bc]", {"x": 1}, tmp_path).save(0, {}, {})
    BlockStore("ab", {"x": 1}, tmp_path).save(0, {}, {})
    assert "a[bc]@" in begin("a[bc]", {"x": 2}, tmp_path, caplog)
    BlockStore("a[bc]", {}, tmp_path).clear()
    assert [p.name[:3] for p in tmp_path.iterdir()] == ["ab@"]
