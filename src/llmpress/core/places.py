"""Folders that appear whole: written beside their place under a lock, put there by renaming.

A process that is killed leaves its folders behind but not its lock, so that whoever comes next
knows them for what they are: what was being written is removed, what was moved aside is put back.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmpress.core.errors import ArtifactError

ASIDE = ".aside"
"""Ends the name of an older folder while the new one takes its place."""


@dataclass(frozen=True)
class Place:
    """A place that nobody else writes to for now.

    Attributes:
        out: Where the folder is to appear.
        folder: Where it is written; empty at first.
    """

    out: Path
    folder: Path

    def put(self) -> None:
        """Let the folder appear where it belongs; an older one goes when the new one is there."""
        aside = self.folder.with_name(self.folder.name + ASIDE)
        with _alone(self.out.parent):
            if self.out.exists():
                self.out.rename(aside)
            try:
                self.folder.rename(self.out)
            except BaseException:
                if aside.exists():
                    aside.rename(self.out)
                raise
        if aside.exists():
            _remove(aside)


def write_whole(file: Path, text: str) -> None:
    """Write a text file, UTF-8, that an older one makes way for when it is complete."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def beside(out: Path) -> str:
    """Return how the names begin of what lies beside ``out`` only while that is written."""
    return f".{out.name}.writing-"


@contextmanager
def claimed(out: Path, check: Callable[[], object]) -> Iterator[Place]:
    """Hold a place until the end; the folder that was not put there by then is removed.

    Args:
        out: Where a folder is to appear.
        check: Called as soon as nobody else writes there; refuses by raising.

    Raises:
        ArtifactError: Another process is writing there.
    """
    if out.name in ("", ".."):  # of "." and the like
        out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out.parent):
        _clean(out)
        check()
        folder = Path(tempfile.mkdtemp(prefix=beside(out), dir=out.parent))
        lock = _lock(folder)
    try:
        folder.chmod(0o755)
        yield Place(out, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def holds(folder: Path, given: Path) -> bool:
    """Whether ``given``, or a file that a link in it leads to, is ``folder`` or lies inside.

    Asks the file system, so that links, relative names and, where it matters, case are no way
    around.
    """
    seen = [given, *(given.iterdir() if given.is_dir() else ())]
    names = {name for path in seen for name in (path.absolute(), path.resolve())}
    above = {place for name in names for place in (name, *name.parents)}
    return any(place.exists() and place.samefile(folder) for place in above)


def strangers(folder: Path, known: Iterable[str]) -> list[str]:
    """Return the names of files in a folder, and in those inside, that are not ``known``."""
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    return sorted(found - set(known))


def _clean(out: Path) -> None:
    """Set right what killed processes left beside ``out``."""
    for folder in [p for p in out.parent.iterdir() if p.name.startswith(beside(out))]:
        try:
            lock = _lock(folder)
        except BlockingIOError:
            raise ArtifactError(
                f"{out}: another run is writing it right now; wait until that is done, or choose "
                "another `out`"
            ) from None
        if lock is None:
            continue
        os.close(lock)
        if folder.name.endswith(ASIDE) and not out.exists():
            folder.rename(out)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _remove(aside: Path) -> None:
    """Remove an older folder that is not needed any more, and is not to be put back half empty.

    Where that fails it stays for the next run to remove: the new one is in its place.
    """
    with suppress(OSError):
        aside = aside.rename(aside.with_name(aside.name.removesuffix(ASIDE)))
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from claiming or taking places in ``folder`` for a moment."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends.

    Returns:
        The descriptor, or None where the file system has no locks.

    Raises:
        BlockingIOError: A living process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
