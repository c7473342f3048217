"""Folders with a known origin: written whole or not at all, with a provenance.json inside.

An artifact's fingerprint is the SHA-256 over the names and contents of its files, provenance.json
apart, so that the same bytes made twice have the same fingerprint. Whatever opens an artifact
verifies it first: a file that is not what provenance.json says is refused, never computed with.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from llmpress.core.environment import hardware, packages, peak_memory_bytes
from llmpress.core.errors import ArtifactError
from llmpress.core.places import Place, claimed, holds, strangers, write_whole

PROVENANCE = "provenance.json"
TRAINING = "training.json"
"""What was trained end to end, on what, with which losses; in what training made."""
PEER = "peer.json"
"""True size of what another tool made, beside the dense weights that it stands for."""
WEIGHTS_INDEX = "model.safetensors.index.json"
"""Says which shard each tensor is in, where a model has several."""
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What a model folder without provenance is fingerprinted by."""
SHOW_PROGRESS_ABOVE = 2_000_000_000  # bytes; hashing fewer takes some three seconds


def free_place(out: Path | str, *, force: bool, inputs: Iterable[Path | str | None] = ()) -> Path:
    """Return where to write, after checking that nothing is replaced that nobody gave up.

    Args:
        out: Where to write.
        force: Whether an artifact may be replaced; nothing else ever is.
        inputs: What is read; None is passed over.

    Raises:
        ArtifactError: It is an input or holds one, it exists and ``force`` is not given, or it is
            no artifact or one that somebody put own files into.
    """
    out = Path(out)
    if not os.path.lexists(out):
        return out
    remedy = "choose another `out`"
    if held := next((i for i in inputs if i is not None and holds(out, Path(i))), None):
        where = "is an input" if out.samefile(held) else f"holds the input {held}"
        raise ArtifactError(f"{out}: {where}, and inputs are never replaced; {remedy}")
    if not force:
        raise ArtifactError(f"{out}: exists already; {remedy}, or force (--force)")
    if out.is_symlink() or not out.is_dir():
        what = "link" if out.is_symlink() else "file"
        raise ArtifactError(f"{out}: is a {what}, and --force replaces artifacts alone; {remedy}")
    if (files := strangers(out, (PROVENANCE,))) or (out / PROVENANCE).exists():
        known = _files_of(out)
        if known is None:
            raise ArtifactError(
                f"{out}: was not made by llmpress, or its {PROVENANCE} is damaged, and --force "
                f"replaces artifacts alone; {remedy}, or remove it"
            )
        if own := sorted(set(files) - set(known)):
            raise ArtifactError(
                f"{out}: holds {own[0]}, which --force would remove and llmpress did not write; "
                f"move it away, or {remedy}"
            )
    return out


def _files_of(folder: Path) -> dict[str, str] | None:
    try:
        files: dict[str, str] = read_provenance(folder)["files"]
    except ArtifactError:
        return None
    return files


@contextmanager
def claim(
    out: Path | str, *, force: bool, inputs: Iterable[Path | str | None] = ()
) -> Iterator[Place]:
    """Hold a place for an artifact before anything is computed; see `free_place`, `claimed`.

    Yields:
        The place, which `artifact_folder` takes.

    Raises:
        ArtifactError: As `free_place`, or another process is writing there.
    """
    given = tuple(inputs)
    with claimed(Path(out), lambda: free_place(out, force=force, inputs=given)) as place:
        yield place


@contextmanager
def artifact_folder(
    out: Path | Place,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    seconds: Callable[[], float] | None = None,
) -> Iterator[Path]:
    """Build an artifact beside its final place and move it there when it is complete.

    Args:
        out: The artifact's folder, or what `claim` gave; an older artifact is replaced.
        stage: What makes it, for provenance.json.
        settings: The settings it is made with, JSON-representable.
        inputs: Folders it is made from, by role; they are verified, their fingerprints recorded.
        seconds: How long it took, asked at the end; this call alone without it.

    Yields:
        An empty temporary folder to write into. On an error it is removed and ``out`` is left
        alone.

    Raises:
        ArtifactError: An input is missing or damaged, or what is there is not to be replaced.
    """
    if isinstance(out, Path):
        with (
            claim(out, force=True, inputs=inputs.values()) as place,
            artifact_folder(
                place, stage=stage, settings=settings, inputs=inputs, seconds=seconds
            ) as folder,
        ):
            yield folder
        return
    started = time.perf_counter()
    fingerprints = {role: fingerprint(folder) for role, folder in inputs.items()}
    found = {role: _quantized_by(folder) for role, folder in inputs.items()}
    dequantized = {role: method for role, method in found.items() if method}
    folder = out.folder
    yield folder
    (folder / PROVENANCE).unlink(missing_ok=True)  # copied along from an input
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
        files[path.relative_to(folder).as_posix()] = sha256(path)
    provenance = {
        "stage": stage,
        "fingerprint": _fingerprint(files),
        "inputs": fingerprints,
        **({"dequantized": dequantized} if dequantized else {}),
        "settings": dict(settings),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds() if seconds else time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "hardware": hardware(),
        "packages": packages(),
        "files": files,
    }
    write_json(folder / PROVENANCE, provenance)
    out.put()


def _quantized_by(folder: Path) -> str | None:
    """Return how somebody else quantized a model, None for anything else."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return None if method in (None, "llmpress") else str(method)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what provenance.json says of the artifact in ``folder``, whose files are not read.

    Raises:
        ArtifactError: No such artifact, or a damaged record.
    """
    if not (folder / PROVENANCE).is_file():
        raise ArtifactError(f"{folder}: no artifact here ({PROVENANCE} is missing); make it first")
    record = read_json(folder / PROVENANCE)
    if not isinstance(record, dict) or "fingerprint" not in record:
        raise ArtifactError(f"{folder / PROVENANCE}: holds no fingerprint; make the artifact again")
    files = record.get("files")
    if (
        not isinstance(files, dict)
        or not all(isinstance(digest, str) for digest in files.values())
        or _fingerprint(files) != record["fingerprint"]
    ):
        raise ArtifactError(
            f"{folder / PROVENANCE}: damaged, its fingerprint does not fit its list of files; "
            "make the artifact again"
        )
    return record


def verify(folder: Path, weights: Iterable[Path] = (), *, complete: bool = True) -> dict[str, Any]:
    """Compare every file of an artifact with the checksum in its provenance.json.

    A file that was verified before in this process, and has the size and the time of change it had
    then, is not read again.

    Args:
        folder: The artifact.
        weights: Files that are about to be read: they must be on the list too.
        complete: Whether all files of the artifact have to be there; transformers downloads some.

    Returns:
        The provenance.

    Raises:
        ArtifactError: A file is missing, differs, or does not belong to the artifact.
    """
    record = read_provenance(folder)
    files: dict[str, str] = record["files"]
    for path in weights:
        if path.name not in files:
            raise ArtifactError(
                f"{path}: is not in {PROVENANCE}; remove it, or make {folder} again"
            )
    present = [name for name in files if (folder / name).is_file()]
    if complete and (missing := sorted(set(files) - set(present))):
        raise ArtifactError(
            f"{folder / missing[0]}: is missing; make the artifact again (after an edit on "
            f"purpose: delete {PROVENANCE})"
        )
    total = sum((folder / name).stat().st_size for name in present)
    quiet = total < SHOW_PROGRESS_ABOVE
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=quiet) as bar:
        for name in present:
            if _verified_digest(folder / name) != files[name]:
                raise ArtifactError(
                    f"{folder / name}: differs from its checksum in {PROVENANCE}, so it is damaged "
                    "or was edited; make the artifact again (after an edit on purpose: delete "
                    f"{PROVENANCE})"
                )
            bar.update((folder / name).stat().st_size)
    return record


def fingerprint(folder: Path, config: str = "config.json") -> str:
    """Return what identifies a folder's content: 64 hex digits.

    An artifact is verified first. A model folder that has no provenance, such as one downloaded by
    hand, is identified by its weights, configuration and tokenizer.

    Args:
        folder: The artifact, or the model.
        config: The file that a model without provenance must have.

    Raises:
        ArtifactError: Neither an artifact nor a model, or damaged.
    """
    if (folder / PROVENANCE).is_file() or not (folder / config).is_file():
        found: str = verify(folder)["fingerprint"]
        return found
    files = {p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()}
    return _fingerprint({path.name: _verified_digest(path) for path in files})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: The file cannot be written; safetensors itself hides which error it was.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole; NaN and Inf are refused, as JSON has none."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: Missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; make the artifact again") from None
    except ValueError as error:
        raise ArtifactError(
            f"{path}: damaged, no JSON ({error}); make the artifact again"
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """Return the bytes of all files in ``folder`` whose name matches ``pattern``."""
    return sum(p.stat().st_size for p in folder.glob(pattern))


_digests: dict[Path, tuple[int, int, str]] = {}


def _verified_digest(path: Path) -> str:
    state = path.stat()
    size, changed, digest = _digests.get(path.resolve(), (-1, -1, ""))
    if (size, changed) != (state.st_size, state.st_mtime_ns):
        digest = sha256(path)
        _digests[path.resolve()] = (state.st_size, state.st_mtime_ns, digest)
    return digest


def _fingerprint(files: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
