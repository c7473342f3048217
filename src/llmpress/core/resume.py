"""Per-block checkpoints of a long computation: killed at any moment, a rerun continues.

Checkpoints lie in a scratch folder whose name holds a fingerprint of everything that decides the
result (inputs, settings, code, packages), so work of other weights, settings or code is never
picked up; what was different is said.
"""

import glob
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from llmpress.core.artifacts import read_json, save_tensors, sha256, write_json
from llmpress.core.environment import packages
from llmpress.core.errors import ArtifactError, ConfigError, NumericalError

logger = logging.getLogger(__name__)

SCRATCH = Path("scratch")
"""Of the pipeline's stages."""
STATE = "state.json"
NOT_A_BLOCK = 9000  # from here on a store holds what belongs to no single block
FINGERPRINT = re.compile("[0-9a-f]{64}")


def scratch_folder(out: Path) -> Path:
    """Return where the finished blocks of an unfinished computation lie: beside its result."""
    return out.parent / f".{out.name}.unfinished"


class BlockStore:
    """Finished blocks of one computation.

    Args:
        task: What is computed, for example ``compress-rtn-4bit``.
        decided_by: Everything that decides the result, JSON-representable; the code of the loaded
            llmpress modules and the versions of packages are added.
        root: Folder for all scratch data.

    As a context manager it says at the start where it continues, or why finished blocks of the same
    task cannot be used; at the end it removes its checkpoints, except when the computation was
    interrupted or hit a limit of the machine.
    """

    def __init__(self, task: str, decided_by: Mapping[str, Any], root: Path) -> None:
        self._opened = self._started = time.perf_counter()
        state = {"decided_by": decided_by, "code": _code(), "packages": packages()}
        text = json.dumps(state, sort_keys=True, default=str)
        self._state: dict[str, dict[str, Any]] = json.loads(text)
        self._task = task
        self._root = root
        self.folder = root / f"{task}@{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __enter__(self) -> Self:
        """Keep finished blocks while the computation runs, and say what an earlier one left."""
        if count := _finished(self.folder):
            logger.warning(
                "%s: continues after %d finished blocks, which are read from %s",
                self._task,
                count,
                self.folder,
            )
        for folder in self._all():
            if folder != self.folder and (count := _finished(folder)):
                logger.warning(
                    "%s: starts anew, as the %d finished blocks in %s are of other work (%s); they "
                    "are removed when this run is done",
                    self._task,
                    count,
                    folder,
                    self._difference(folder),
                )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove them when it is done, or can only be repeated with other weights or settings."""
        if kind is None or issubclass(kind, NumericalError | ConfigError | ValueError):
            self.clear()

    def seconds(self) -> float:
        """Return the wall seconds so far, those of the processes that are continued included."""
        return time.perf_counter() - self._started

    def load(self, index: int | str) -> tuple[dict[str, Tensor], Any] | None:
        """Return tensors and record of a finished block, None when it has to be computed.

        A damaged checkpoint is as good as none: its block is computed again.
        """
        tensors, record = (self._file(index, suffix) for suffix in ("safetensors", "json"))
        if not (record.is_file() and tensors.is_file()):
            return None
        try:
            content = read_json(record)
            if content["sha256"] == sha256(tensors):
                self._started = min(self._started, self._opened - content["seconds"])
                return load_file(tensors), content["record"]
        except (ArtifactError, KeyError, TypeError):
            pass
        logger.warning("%s: damaged, what it held is computed again", record)
        return None

    def save(self, index: int | str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Keep a finished block or a named state; the record is written last and makes it valid."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / STATE).is_file():
            write_json(self.folder / STATE, self._state)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path, temporary = (self._file(index, suffix) for suffix in ("safetensors", "tmp"))
        save_tensors(contiguous, path)
        seal = {"sha256": sha256(path), "seconds": self.seconds(), "record": record}
        write_json(temporary, seal)
        temporary.rename(temporary.with_suffix(".json"))

    def drop(self, index: int | str) -> None:
        """Remove a checkpoint."""
        for suffix in ("json", "safetensors"):
            self._file(index, suffix).unlink(missing_ok=True)

    def _file(self, index: int | str, suffix: str) -> Path:
        name = index if isinstance(index, str) else f"{index:04d}"
        return self.folder / f"{name}.{suffix}"

    def clear(self) -> None:
        """Remove all checkpoints of this task, of older settings too."""
        for folder in self._all():
            shutil.rmtree(folder)
        with suppress(OSError):  # another task's checkpoints are in there, or there were none
            self._root.rmdir()

    def _all(self) -> list[Path]:
        return sorted(self._root.glob(f"{glob.escape(self._task)}@*"))

    def _difference(self, folder: Path) -> str:
        """Say in a few words what decided the blocks in ``folder`` that is different now."""
        try:
            before = read_json(folder / STATE)
            found = [
                *_changed(before["decided_by"], self._state["decided_by"]),
                *_changed(before["packages"], self._state["packages"]),
            ]
            old, new = before["code"], self._state["code"]
            files = sorted(f for f in old.keys() | new.keys() if old.get(f) != new.get(f))
        except (ArtifactError, KeyError, TypeError, AttributeError):
            return "its record is damaged"
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        code = [f"code of {', '.join(files[:3])}{more}"] if files else []
        return "; ".join([*found, *code])


def _finished(folder: Path) -> int:
    return sum(int(path.stem) < NOT_A_BLOCK for path in folder.glob("[0-9]*.json"))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name each entry that differs; fingerprints of inputs are not shown."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            found += _changed(before, now, f"{prefix}{key}.")
        elif all(isinstance(v, str) and FINGERPRINT.fullmatch(v) for v in (before, now)):
            found.append(f"another {prefix}{key}")
        else:
            found.append(f"{prefix}{key} {_shown(before)}, now {_shown(now)}")
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _code() -> dict[str, str]:
    """Return a checksum of each loaded file of llmpress."""
    package = Path(__file__).parents[1]
    modules = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "llmpress"]
    files = {Path(module.__file__) for module in modules if module.__file__}
    return {
        (path.relative_to(package) if path.is_relative_to(package) else path).as_posix(): sha256(
            path
        )[:16]
        for path in sorted(files)
    }
