"""Folders with a known origin: written whole or not at all, with a provenance.json inside.

An artifact's fingerprint is the SHA-256 over the names and contents of its files, provenance.json
apart, so that the same bytes made twice have the same fingerprint.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmpress.errors import ArtifactError

PROVENANCE = "provenance.json"
RECORDED_PACKAGES = (
    "llmpress",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "faiss-cpu",
    "triton",
)


@contextmanager
def artifact_folder(
    out: Path, *, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> Iterator[Path]:
    """Build an artifact beside its final place and move it there when it is complete.

    Args:
        out: The artifact's folder; an older one is replaced.
        stage: What makes it, for provenance.json.
        settings: The settings it is made with, JSON-representable.
        inputs: Folders it is made from, by role; their fingerprints are recorded.

    Yields:
        An empty temporary folder to write into. On an error it is removed and ``out`` is left
        alone.

    Raises:
        ArtifactError: An input is missing or has no readable provenance.
    """
    started = time.perf_counter()
    fingerprints = {role: read_provenance(folder)["fingerprint"] for role, folder in inputs.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        files = {
            p.relative_to(temporary).as_posix(): sha256(p)
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        provenance = {
            "stage": stage,
            "fingerprint": _fingerprint(files),
            "inputs": fingerprints,
            "settings": dict(settings),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "hardware": hardware(),
            "packages": packages(),
            "files": files,
        }
        write_json(temporary / PROVENANCE, provenance)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what provenance.json says of the artifact in ``folder``.

    Raises:
        ArtifactError: No such artifact, or a damaged record.
    """
    if not (folder / PROVENANCE).is_file():
        raise ArtifactError(f"{folder}: no artifact here ({PROVENANCE} is missing); make it first")
    record = read_json(folder / PROVENANCE)
    if not isinstance(record, dict) or "fingerprint" not in record:
        raise ArtifactError(f"{folder / PROVENANCE}: holds no fingerprint; make the artifact again")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and Inf are refused, as JSON has none."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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


def peak_memory_bytes() -> int:
    """Return the process's largest resident set so far, plus the largest GPU allocation."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resident * unit + device


def hardware() -> dict[str, Any]:
    """Return what the computation ran on: processor, cores, threads used, GPU."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _fingerprint(files: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
