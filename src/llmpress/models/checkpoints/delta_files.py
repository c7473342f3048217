"""Delta folders on disk: delta.json says what is there, delta.safetensors (or its shards) holds it.

Two kinds share the format. A ``delta`` holds ``<layer>.weight``, the fp32 difference fine-tuned
minus base of each linear layer that changed; a ``compressed_delta`` holds ``<layer>.<tensor>``, the
packed tensors of its compressed layers. Both hold ``exact.<name>`` for every other tensor that
changed: the fine-tuned tensor itself, at its own dtype. Of a matrix of which few rows changed they
hold these rows alone: ``exact_rows.<name>.index [k]`` and ``exact_rows.<name>.rows [k, columns]``.
Where the fine-tuned model's configuration differs, delta.json says how, and its version is 3: what
knows only version 2 would apply such a delta with the base's configuration.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmpress.core.artifacts import read_json, write_json
from llmpress.core.errors import ArtifactError
from llmpress.core.shards import ShardWriter

HEADER = "delta.json"
FORMAT_VERSION, WITH_CONFIG = 2, 3
DELTA_SHARD_BYTES = 1 << 30
EXACT = "exact."
EXACT_ROWS = "exact_rows."

Kind = Literal["delta", "compressed_delta"]


class DeltaWriter:
    """Writes a delta folder, one tensor in memory at a time.

    Args:
        folder: Where to write.
        max_shard_bytes: A shard is closed before it would exceed this.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = DELTA_SHARD_BYTES) -> None:
        self.folder = folder
        self._shards = ShardWriter(folder, "delta", max_shard_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is written when its shard is full."""
        self._shards.add(name, tensor)

    def close(self, kind: Kind, header: Mapping[str, Any]) -> None:
        """Write what is left, give the shards their names, and write delta.json last."""
        files = self._shards.close()
        version = WITH_CONFIG if header.get("config") else FORMAT_VERSION
        first = {"format_version": version, "kind": kind}
        write_json(self.folder / HEADER, {**first, **header, "files": files})


class DeltaFolder:
    """A delta folder, read tensor by tensor; each has a file mapping of its own, let go with it.

    Args:
        folder: Where it lies.
        kind: What it has to hold.

    Attributes:
        header: What delta.json says.

    Raises:
        ArtifactError: No such folder, of the other kind or another version, or damaged.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = folder
        if not (folder / HEADER).is_file():
            raise ArtifactError(f"{folder}: no delta here ({HEADER} is missing); make it first")
        self.header: dict[str, Any] = read_json(folder / HEADER)
        version, found = self.header.get("format_version"), self.header.get("kind")
        if version not in (FORMAT_VERSION, WITH_CONFIG):
            raise ArtifactError(
                f"{folder}: delta of format version {version}, this llmpress reads versions "
                f"{FORMAT_VERSION} and {WITH_CONFIG}; make it again"
            )
        if found != kind:
            raise ArtifactError(f"{folder}: holds a {found}, a {kind} is needed here")
        for name in self.header["files"]:
            _opened(folder / name)  # what is missing or damaged is named at once
        self._where = {n: file for file, names in self.header["files"].items() for n in names}

    @property
    def config(self) -> dict[str, Any]:
        """What the fine-tuned model's configuration has other than its base's."""
        changes: dict[str, Any] = self.header.get("config", {})
        return changes

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """By name, what `llmpress.nn.layers.layer_entry` says of each compressed layer.

        ``shape`` comes with it. Of a delta that is not compressed there are none.
        """
        entries: dict[str, dict[str, Any]] = self.header.get("layers", {})
        return entries

    def names(self) -> list[str]:
        """Return the names of all stored tensors, sorted."""
        return sorted(self._where)

    def exact_names(self) -> list[str]:
        """Return the model's names of the tensors that are kept exactly."""
        return sorted(self.header["exact"])

    def exact_shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor that is kept exactly."""
        if name in self.header["exact_rows"]:
            return tuple(self.header["exact_rows"][name]["shape"])
        return tuple(self.tensor(EXACT + name).shape)

    def exact(self, name: str, base: Tensor | None) -> Tensor:
        """Return a fine-tuned tensor that is kept exactly, whole or by the rows that changed.

        Args:
            name: Its name in the model.
            base: The base's tensor of this name, None where it has none.

        Returns:
            All of the fine-tuned tensor, at its own dtype.

        Raises:
            ArtifactError: No such tensor, or rows that do not fit the base's tensor.
        """
        if name not in self.header["exact_rows"]:
            return self.tensor(EXACT + name)
        shape = self.exact_shape(name)
        index = self.tensor(f"{EXACT_ROWS}{name}.index")
        rows = self.tensor(f"{EXACT_ROWS}{name}.rows")
        if base is None or base.shape[1:] != shape[1:] or len(base) > shape[0]:
            found = "nothing" if base is None else list(base.shape)
            raise ArtifactError(
                f"{self.folder}: holds changed rows of {name} {list(shape)}, but the base has "
                f"{found} there; use the delta's own base"
            )
        full = rows.new_empty(shape)
        full[: len(base)] = base
        try:
            full[index] = rows
        except (IndexError, RuntimeError):
            raise ArtifactError(
                f"{self.folder}: the rows of {name} do not fit its shape {list(shape)}; make it "
                "again"
            ) from None
        return full

    def exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is stored of the tensors that are kept exactly: stored name and tensor."""
        for name in self.names():
            if name.startswith((EXACT, EXACT_ROWS)):
                yield name, self.tensor(name)

    def exact_bytes(self) -> int:
        """Return the bytes that the tensors that are kept exactly take, indices included."""
        return sum(t.numel() * t.element_size() for _, t in self.exact_tensors())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ArtifactError: It is not there.
        """
        try:
            with _opened(self.folder / self._where[name]) as shard:
                tensor: Tensor = shard.get_tensor(name)
        except (KeyError, SafetensorError):
            raise ArtifactError(f"{self.folder}: holds no tensor {name!r}; make it again") from None
        return tensor

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose name starts with ``prefix``, which is cut off.

        A file is opened once for all of them: its header lists thousands.

        Raises:
            ArtifactError: A file lacks one of them.
        """
        names = sorted(name for name in self._where if name.startswith(prefix))
        found: dict[str, Tensor] = {}
        for file in sorted({self._where[name] for name in names}):
            with _opened(self.folder / file) as shard:
                for name in (name for name in names if self._where[name] == file):
                    try:
                        found[name.removeprefix(prefix)] = shard.get_tensor(name)
                    except SafetensorError:
                        raise ArtifactError(
                            f"{self.folder}: holds no tensor {name!r}; make it again"
                        ) from None
        return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: is missing; make the delta again") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); make the delta again") from None
