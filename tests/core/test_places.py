"""Where artifacts go: nothing is lost that somebody made, and one process writes at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpress.core.artifacts import artifact_folder, claim, free_place, read_json, write_json
from llmpress.core.errors import ArtifactError


def make(out: Path, value: int = 1) -> Path:
    with artifact_folder(out, stage="x", settings={}, inputs={}) as folder:
        write_json(folder / "a.json", value)
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link_to_an_artifact(out: Path) -> None:
    out.symlink_to(make(out.with_name("elsewhere")), target_is_directory=True)


def a_broken_link(out: Path) -> None:
    out.symlink_to(out.with_name("nowhere"))


def somebodys_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def a_model_without_provenance(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")


def somebodys_provenance(out: Path) -> None:
    out.mkdir()
    (out / "provenance.json").write_text('{"painter": "unknown"}')


def an_artifact_with_notes(out: Path) -> None:
    (make(out) / "thesis.txt").write_text("years of work")


def an_artifact_with_a_folder_inside(out: Path) -> None:
    make(make(out) / "inside")


def an_artifact_with_a_link(out: Path) -> None:
    (make(out) / "data").symlink_to(out.parent, target_is_directory=True)


@pytest.mark.parametrize(
    "there",
    [
        a_file,
        a_link_to_an_artifact,
        a_broken_link,
        somebodys_folder,
        a_model_without_provenance,
        somebodys_provenance,
        an_artifact_with_notes,
        an_artifact_with_a_folder_inside,
        an_artifact_with_a_link,
    ],
)
def test_force_replaces_nothing_that_somebody_made(
    there: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    there(out)
    before = names(tmp_path)
    for action in (lambda: free_place(out, force=True), lambda: make(out)):
        with pytest.raises(ArtifactError, match=str(out)):
            action()
    assert names(tmp_path) == before


def test_force_replaces_artifacts_damaged_ones_too_and_empty_folders(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "a.json").write_text("damaged")
    with pytest.raises(ArtifactError, match="out"):
        free_place(out, force=False)
    assert read_json(make(out, 2) / "a.json") == 2
    (out / "a.json").unlink()
    assert read_json(make(out, 3) / "a.json") == 3
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_json(make(empty) / "a.json") == 1
    assert names(tmp_path) == [
        *("empty", "empty/a.json", "empty/provenance.json"),
        *("out", "out/a.json", "out/provenance.json"),
    ]


@pytest.mark.parametrize(
    "out",
    ["models/mine", "models", ".", "models/../models/mine", "link", "models/mine/", "way/mine"],
)
@pytest.mark.parametrize("given", ["models/mine", "link", "linked-files"])
def test_an_input_is_never_replaced_nor_a_folder_that_holds_one(
    out: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = make(Path("models/mine"))
    Path("link").symlink_to(mine.absolute(), target_is_directory=True)
    Path("way").symlink_to("models", target_is_directory=True)
    Path("linked-files").mkdir()
    Path("linked-files/a.json").symlink_to((mine / "a.json").absolute())
    before = names(tmp_path)
    for force in (True, False):
        with pytest.raises(ArtifactError, match="input"):
            free_place(out, force=force, inputs=[None, given])
    with (
        pytest.raises(ArtifactError),
        artifact_folder(Path(out), stage="x", settings={}, inputs={"model": Path(given)}),
    ):
        pass
    assert names(tmp_path) == before


def test_other_case_is_no_way_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that tells no case: two names, one folder."""
    mine, other = make(tmp_path / "mine"), make(tmp_path / "Mine")
    same = Path.samefile
    monkeypatch.setattr(
        Path,
        "samefile",
        lambda one, two: same(*(Path(str(path).replace("Mine", "mine")) for path in (one, two))),
    )
    with pytest.raises(ArtifactError, match="input"):
        free_place(other, force=True, inputs=[mine])


def test_what_lies_beside_an_input_may_be_replaced(tmp_path: Path) -> None:
    out, given = make(tmp_path / "out"), make(tmp_path / "out-2")
    assert free_place(out, force=True, inputs=[given, given / "a.json", "nowhere"]) == out


# Replaces an artifact and is killed at one of the renames that this takes.
KILLED = """
import os, pathlib, signal, sys
from llmpress.core.artifacts import artifact_folder, write_json
out, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rename, count = pathlib.Path.rename, 0
def counted(path, target):
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
pathlib.Path.rename = counted
with artifact_folder(out, stage="x", settings={}, inputs={}) as folder:
    write_json(folder / "a.json", 2)
"""


@pytest.mark.parametrize(("last", "kept"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_killed_while_it_replaces_one_of_both_is_whole(
    tmp_path: Path, last: int, kept: int
) -> None:
    out = make(tmp_path / "out")
    command = [sys.executable, "-c", KILLED, str(out), str(last)]
    status = subprocess.run(command, check=False).returncode
    assert status == (0 if last == 4 else -signal.SIGKILL)
    with pytest.raises(ArtifactError, match="exists"), claim(out, force=False):
        pass  # whoever comes next puts back what was there
    assert read_json(out / "a.json") == kept
    assert names(tmp_path) == ["out", "out/a.json", "out/provenance.json"]
    assert read_json(make(out, 2) / "a.json") == 2
    assert names(tmp_path) == ["out", "out/a.json", "out/provenance.json"]


def test_a_place_is_held_from_the_beginning(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, force=False) as place:
        for action in (lambda: make(out), lambda: make(tmp_path / ".." / tmp_path.name / "out")):
            with pytest.raises(ArtifactError, match="another run"):
                action()
        with artifact_folder(place, stage="x", settings={}, inputs={}) as folder:
            write_json(folder / "a.json", 2)
    assert read_json(out / "a.json") == 2
    with pytest.raises(ArtifactError, match="exists"), claim(out, force=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_older_one_stays_where_the_new_one_cannot_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith("aside"):
            raise OSError(122, os.strerror(122), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="quota"):
        make(out, 2)
    monkeypatch.undo()
    assert read_json(out / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
