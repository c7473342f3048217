"""Named tensors written into safetensors files of bounded size, one tensor in memory."""

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from llmpress.core.artifacts import save_tensors


class ShardWriter:
    """Writes tensors into shards and gives these their names when their number is known.

    A shard's file can only be written when all its tensors are known; until then each lies in a
    file of its own, so that no more than one tensor is in memory.

    Args:
        folder: Where to write.
        name: Of the files: ``<name>.safetensors``, or ``<name>-00001-of-00003.safetensors``.
        max_shard_bytes: A shard is closed before it would exceed this.
    """

    def __init__(self, folder: Path, name: str, max_shard_bytes: int) -> None:
        self.folder = folder
        self.name = name
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Path] = {}
        self._pending_bytes = 0
        self._spool = folder / ".spool"
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is written when its shard is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._spool.mkdir(exist_ok=True)
        self._pending[name] = self._spool / f"{len(self._pending):06d}.safetensors"
        save_tensors({name: tensor.detach().cpu().contiguous()}, self._pending[name])
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> dict[str, list[str]]:
        """Write what is left, name the shards, and return the names of the tensors in each."""
        self._flush()
        count = len(self._shards)
        files: dict[str, list[str]] = {}
        for number, names in enumerate(self._shards, start=1):
            place = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            final = f"{self.name}{place}.safetensors"
            self._part(number).rename(self.folder / final)
            files[final] = names
        return files

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            mapped = {name: load_file(path)[name] for name, path in self._pending.items()}
            save_tensors(mapped, self._part(len(self._shards)), metadata={"format": "pt"})
            shutil.rmtree(self._spool)
            self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"
