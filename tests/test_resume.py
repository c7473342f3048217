"""Per-block checkpoints belong to exactly one computation."""

import contextlib
from pathlib import Path

import pytest
import torch

from llmpress.errors import ArtifactError, NumericalError
from llmpress.resume import BlockStore


def test_a_finished_block_comes_back(tmp_path: Path) -> None:
    store = BlockStore("task", {"bits": 3}, tmp_path)
    tensor = torch.arange(6).view(2, 3).t()  # not contiguous
    store.save(4, {"codes": tensor}, {"loss": 0.5})
    found = BlockStore("task", {"bits": 3}, tmp_path).load(4)
    assert found is not None
    torch.testing.assert_close(found[0]["codes"], tensor)
    assert found[1] == {"loss": 0.5}
    assert store.load(3) is None


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
