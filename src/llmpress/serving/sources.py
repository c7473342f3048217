"""Where a server's deltas come from: a folder, the hub, or a remote of DVC."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from llmpress.core.artifacts import verify
from llmpress.core.companions import TOKENIZERS
from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.core.failures import one_line
from llmpress.export.hub import fetch_artifact

HUB, DVC = "hub:", "dvc:"
CACHE = "LLMPRESS_CACHE"
"""Environment variable: where what DVC fetches is kept; by default ~/.cache/llmpress."""


def delta_folder(source: str) -> Path:
    """Return a delta's folder, fetched where need be.

    Args:
        source: A folder; ``hub:owner/name@revision``; or ``dvc:PATH``, ``dvc:PATH@REMOTE``,
            ``dvc:REPOSITORY#PATH@REMOTE``: what DVC tracks there, from the remote of that name.

    Raises:
        ArtifactError: No such folder, or files that are not those of its provenance.
        SourceError: It cannot be fetched.
    """
    if source.startswith(HUB):
        return fetch_artifact(source.removeprefix(HUB))
    if source.startswith(DVC):
        return _from_dvc(source.removeprefix(DVC))
    folder = Path(source)
    if not folder.is_dir():
        raise ArtifactError(f"{source}: no such folder; others begin with {HUB} or {DVC}")
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a delta brings a tokenizer of its own."""
    return any(file.is_file() for pattern in TOKENIZERS for file in folder.glob(pattern))


def _from_dvc(source: str) -> Path:
    """Fetch an artifact into the cache, under the name of its content."""
    tracked, _, remote = source.partition("@")
    repository, separator, path = tracked.rpartition("#")
    if not path or (separator and not repository):
        raise ConfigError(f"{DVC}{source}: write {DVC}PATH@REMOTE or {DVC}REPOSITORY#PATH@REMOTE")
    arguments = ["get", repository or ".", path, *(["--remote", remote] if remote else [])]
    address = _dvc(source, [*arguments, "--show-url"])  # ends with the content's digest
    kept = Path(os.environ.get(CACHE, Path.home() / ".cache/llmpress")) / "dvc"
    folder = kept / hashlib.sha256(address.encode()).hexdigest()[:32]
    if not folder.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        try:
            _dvc(source, [*arguments, "--out", str(part), "--force"])
            verify(part)
            if not folder.is_dir():
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _dvc(source: str, arguments: list[str]) -> str:
    program = shutil.which("dvc")
    if program is None:
        raise SourceError(f"{DVC}{source}: dvc is not installed: pip install 'llmpress[workflow]'")
    done = subprocess.run(
        [program, *arguments, "--quiet"]
        if "--show-url" not in arguments
        else [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(Exception(lines[-1].removeprefix("ERROR:") if lines else "dvc failed"))
        raise SourceError(f"{DVC}{source}: {reason}")
    return done.stdout.strip()
