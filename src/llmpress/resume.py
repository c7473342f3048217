"""Per-block checkpoints of a long computation: killed at any moment, a rerun continues.

Checkpoints lie in a scratch folder whose name holds a fingerprint of everything that decides the
result (inputs, settings, code), so work of other weights, settings or code is never picked up.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from llmpress.artifacts import read_json, save_tensors, sha256, write_json
from llmpress.errors import ArtifactError, ConfigError, NumericalError

logger = logging.getLogger(__name__)

SCRATCH = Path("scratch")


class BlockStore:
    """Finished blocks of one computation.

    Args:
        task: What is computed, for example ``compress-rtn-4bit``.
        decided_by: Everything that decides the result, JSON-representable; the code of the loaded
            llmpress modules is added.
        root: Folder for all scratch data.

    As a context manager it removes its checkpoints at the end, except when the computation was
    interrupted or hit a limit of the machine.
    """

    def __init__(self, task: str, decided_by: Mapping[str, Any], root: Path = SCRATCH) -> None:
        state = json.dumps({**decided_by, "code": _code_fingerprint()}, sort_keys=True, default=str)
        self._pattern = f"{task}@*"
        self._root = root
        self.folder = root / f"{task}@{hashlib.sha256(state.encode()).hexdigest()[:16]}"

    def __enter__(self) -> Self:
        """Keep finished blocks while the computation runs."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove them when it is done, or can only be repeated with other weights or settings."""
        if kind is None or issubclass(kind, NumericalError | ConfigError | ValueError):
            self.clear()

    def load(self, index: int) -> tuple[dict[str, Tensor], Any] | None:
        """Return tensors and record of a finished block, None when it has to be computed.

        A damaged checkpoint is as good as none: its block is computed again.
        """
        tensors = self.folder / f"{index:04d}.safetensors"
        record = self.folder / f"{index:04d}.json"
        if not (record.is_file() and tensors.is_file()):
            return None
        try:
            content = read_json(record)
            if content["sha256"] == sha256(tensors):
                return load_file(tensors), content["record"]
        except (ArtifactError, KeyError, TypeError):
            pass
        logger.warning("%s: damaged, block %d is computed again", record, index)
        return None

    def save(self, index: int, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Keep a finished block; the record is written last and makes it valid."""
        self.folder.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path = self.folder / f"{index:04d}.safetensors"
        save_tensors(contiguous, path)
        temporary = self.folder / f"{index:04d}.tmp"
        write_json(temporary, {"sha256": sha256(path), "record": record})
        temporary.rename(self.folder / f"{index:04d}.json")

    def clear(self) -> None:
        """Remove all checkpoints of this task, of older settings too."""
        for folder in self._root.glob(self._pattern):
            shutil.rmtree(folder)
        with suppress(OSError):  # another task's checkpoints are in there, or there were none
            self._root.rmdir()


def _code_fingerprint() -> str:
    modules = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "llmpress"]
    files = sorted(module.__file__ for module in modules if module.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
