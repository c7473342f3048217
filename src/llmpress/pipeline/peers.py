"""Other tools as runs of the pipeline: params.yaml's section ``peers`` and what its stage does.

A tool is a folder with ``run.py``, which writes a dense checkpoint and ``peer.json``, and
``requirements.txt`` with all of an environment of its own; without that it runs in this one.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llmpress.core.artifacts import PEER, artifact_folder, read_json
from llmpress.core.errors import SourceError
from llmpress.core.params import build, section
from llmpress.core.settings import NameOf, Settings

Tool = Literal["autoround", "block_removal", "gptqmodel", "hqq", "llmcompressor"]
PIP = "pip==26.3"
FIRST = ("torch", "numpy", "setuptools", "wheel", "ninja", "packaging")
"""What others are built with: it is there before them."""


@dataclass(frozen=True)
class Peer(Settings):
    """One entry of ``peers``.

    Attributes:
        tool: Name of a folder of workflow/peers.
        model: Name of the model whose weights are compressed; it has an entry in ``calibrations``.
        settings: The arguments of the tool's function in its run.py.
    """

    tool: Tool
    model: Annotated[str, NameOf("calibrations")]
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_peer(params: Mapping[str, Any], key: str) -> Peer:
    """Return peer ``key`` of params.yaml, checked."""
    return build(Peer, section(params, f"peers.{key}"), f"peers.{key}")


def run_peer(
    tool: Path,
    *,
    model: Path,
    calibration: Path,
    settings: Mapping[str, Any],
    out: Path,
    environments: Path,
) -> None:
    """Compress a model with another tool and write what its weights stand for, dense.

    Args:
        tool: Its folder.
        model: The original.
        calibration: Its calibration, of whose token windows the tool may make use.
        settings: The tool's.
        out: Folder of the artifact; an older one is replaced.
        environments: Where the tools' environments lie.

    Raises:
        SourceError: The tool cannot be installed, or fails.
    """
    environments.mkdir(parents=True, exist_ok=True)
    requirements, python = tool / "requirements.txt", Path(sys.executable)
    if requirements.is_file():
        python = _environment(requirements, environments / tool.name)
    made: dict[str, Any] = {"method": tool.name, **settings}
    inputs = {"model": model, "calibration": calibration}
    with (
        tempfile.TemporaryDirectory(prefix="packed-", dir=environments) as packed,
        artifact_folder(
            out,
            stage="peer",
            settings=made,
            inputs=inputs,
            seconds=lambda: float(read_json(folder / PEER)["seconds"]),
        ) as folder,
    ):
        places = {"model": model, "calibration": calibration, "out": folder, "packed": packed}
        job = {**{role: str(place) for role, place in places.items()}, "settings": dict(settings)}
        _call([python, tool / "run.py", json.dumps(job)], f"{tool.name} failed", tool.parent)
        made["versions"] = read_json(folder / PEER)["versions"]


def _environment(requirements: Path, folder: Path) -> Path:
    """Return the Python of an environment that holds exactly these requirements."""
    python, done = folder / "bin/python", folder / ".installed"
    text = requirements.read_text(encoding="utf-8")
    wanted = hashlib.sha256(text.encode()).hexdigest()
    with _alone(folder):
        if not done.is_file() or done.read_text(encoding="ascii") != wanted:
            done.unlink(missing_ok=True)
            what = f"{requirements}: cannot be installed"
            first = [line for line in text.splitlines() if line.partition("==")[0] in FIRST]
            pip: list[Path | str] = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
            _call([sys.executable, "-m", "venv", "--clear", folder], what)
            _call([*pip, "--upgrade", PIP], what)
            if first:
                _call([*pip, *first], what)
            _call([*pip, "--no-build-isolation", "-r", requirements], what)
            done.write_text(wanted, encoding="ascii")
    return python


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make an environment."""
    with Path(f"{folder}.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _call(command: Sequence[Path | str], what: str, path: Path | None = None) -> None:
    """Run a command; the last line that it says is part of the error.

    Raises:
        SourceError: It fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("VIRTUAL_ENV", None)
    if path:
        environment["PYTHONPATH"] = str(path)
    last = ""
    with subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                sys.stdout.write(line)
                last = line.strip() or last
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise SourceError(f"{what}: {last or process.returncode}; see its lines before this one")
