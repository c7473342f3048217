"""Files of the Hugging Face hub, fetched and checked.

huggingface_hub does the talking, with the token of its environment (HF_TOKEN, or what
``hf auth login`` stored) and the address in HF_ENDPOINT. Two things are added to it: a large file
that was cut off continues where it stopped, in a later run too, and its SHA-256 is held against the
one the hub lists. Large files come one after the other over HTTP, not through Xet, which cannot
continue; those beyond huggingface_hub's limit for HTTP (50 GB) are left to it.
"""

import functools
import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its client's
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but re-exported
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
)
from tqdm.auto import tqdm

from llmpress.core.artifacts import sha256
from llmpress.core.errors import LLMPressError, SourceError
from llmpress.data.sources.patterns import matches

SECONDS_TO_ANSWER = 30.0
_UNREACHABLE = "the hub cannot be reached ({}); check the network, or use `path:` or `package:`"
_CUT = "the connection was cut ({}): run it again, it resumes where it stopped"


def download(
    repository: str,
    revision: str,
    patterns: Sequence[str],
    *,
    repo_type: Literal["model", "dataset"] = "model",
    cache: Path | str | None = None,
) -> Path:
    """Download the files of a repository that match, and check the large ones' SHA-256.

    Args:
        repository: ``owner/name``.
        revision: Branch, tag or commit.
        patterns: Globs as in `llmpress.data.sources.source.opened`.
        repo_type: What kind of repository it is.
        cache: Where the hub's cache lies; by default where huggingface_hub keeps it.

    Returns:
        The snapshot's folder, named after the commit. Without a connection: of what is cached.

    Raises:
        SourceError: Not found, no access, no connection, or a damaged file, which is deleted.
    """
    cache = Path(cache or constants.HF_HUB_CACHE)
    here = functools.partial(
        snapshot_download, repository, repo_type=repo_type, revision=revision, cache_dir=cache
    )
    with reported(repository, revision, SourceError, _UNREACHABLE):
        try:
            commit, tree = _tree(repository, revision, repo_type)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:  # the hub's `*` crosses folders, so these take a little more than ours
                wanted = [pattern.replace("**/", "*") for pattern in patterns]
                unwanted = None if any("/" in pattern for pattern in patterns) else "*/*"
                options = {"allow_patterns": wanted, "ignore_patterns": unwanted}
                return Path(here(local_files_only=True, **options))
            except LocalEntryNotFoundError:
                raise error from None
    files = [file for file in tree if matches(file.path, patterns)]
    if not files:
        raise SourceError(
            f"hub repository {repository} has no file that matches {', '.join(patterns)}"
        )
    with reported(repository, revision, SourceError, _CUT):
        blobs = cache / repo_folder_name(repo_id=repository, repo_type=repo_type) / "blobs"
        for file in files:
            if file.lfs is not None and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                url = hf_hub_url(repository, file.path, repo_type=repo_type, revision=commit)
                _fetch_large(url, file, blobs / file.lfs.sha256)
        # finds the large files in the cache already, fetches the small ones, and lays them out
        folder = Path(here(allow_patterns=[glob.escape(file.path) for file in files]))
    digests = {file.path: file.lfs.sha256 for file in files if file.lfs is not None}
    if damaged := delete_damaged(folder, digests):
        raise SourceError(
            f"hub repository {repository}: {', '.join(damaged)}: the SHA-256 is not the one the "
            "hub lists; the damaged copy is deleted, run it again to fetch it anew"
        )
    return folder


def _tree(
    repository: str, revision: str, repo_type: Literal["model", "dataset"]
) -> tuple[str, list[RepoFile]]:
    """Resolve the revision to a commit and list its files."""
    api = HfApi()
    info = api.repo_info(
        repository, revision=revision, repo_type=repo_type, timeout=SECONDS_TO_ANSWER
    )
    commit = str(info.sha)
    entries = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=repo_type)
    return commit, [entry for entry in entries if isinstance(entry, RepoFile)]


def _fetch_large(url: str, file: RepoFile, blob: Path) -> None:
    """Put one file into the cache, by several requests and over several runs where need be.

    huggingface_hub itself deletes what it has of a file when a download fails.
    """
    partial = blob.with_name(f"{blob.name}.llmpress.incomplete")
    repository = blob.parents[1]
    lock = repository.parent / ".locks" / repository.name / f"{blob.name}.lock"  # the client's own
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        while not blob.exists():
            with partial.open("ab") as out:
                before = out.tell()
                if before > file.size:
                    out.truncate(before := 0)
                try:
                    http_get(
                        url,
                        out,
                        resume_size=before,
                        headers=build_hf_headers(),
                        expected_size=file.size,
                        displayed_filename=file.path,
                        tqdm_class=_bar(),
                    )
                except (HTTPError, OSError) as error:
                    refused = isinstance(error, HfHubHTTPError) or _of_the_disk(error)
                    if refused or not before < out.tell() <= file.size:
                        raise
                    continue  # cut off, but it brought something
            partial.rename(blob)


def _bar() -> Any:
    """A progress bar that is drawn in a log file too, where huggingface_hub's own stays silent."""
    return functools.partial(
        tqdm, mininterval=1.0, dynamic_ncols=True, disable=are_progress_bars_disabled()
    )


def delete_damaged(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the files with another SHA-256, and delete them from the cache."""
    damaged = []
    total = sum((folder / name).stat().st_size for name in digests)
    with _bar()(total=total, desc="check SHA-256", unit="B", unit_scale=True) as bar:
        for name, digest in digests.items():
            size = (folder / name).stat().st_size
            if sha256(folder / name) != digest:
                damaged.append(name)
                (folder / name).resolve().unlink(missing_ok=True)
                (folder / name).unlink(missing_ok=True)
            bar.update(size)
    return damaged


@contextmanager
def reported(
    repository: str, revision: str, kind: type[LLMPressError], otherwise: str
) -> Iterator[None]:
    """Turn what the hub's client raises into one line; ``otherwise`` is for broken connections."""
    try:
        yield
    except (HTTPError, OSError, HFValidationError, RuntimeError) as error:
        cause = error
        while isinstance(cause, LocalEntryNotFoundError | RuntimeError) and cause.__cause__:
            cause = cause.__cause__  # type: ignore[assignment]
        known = isinstance(cause, HTTPError | OSError | HFValidationError | RuntimeError)
        if not known or _of_the_disk(cause):
            raise
        reason = _reason(cause, revision, otherwise)
    else:
        return
    raise kind(f"hub repository {repository}: {reason}")


def _of_the_disk(error: BaseException) -> bool:
    """Whether the operating system refused to write; the client's own OSErrors have no number."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError | TimeoutError)
    )


def _reason(error: BaseException, revision: str, otherwise: str) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, OfflineModeIsEnabled):
            return "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        return line if isinstance(error, HFValidationError) else otherwise.format(line)
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        if status == 403:
            return "access is gated, and the token's account has none: accept its terms on the hub"
        return "access is gated: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}: name a branch, a tag or a commit"
    if isinstance(error, RepositoryNotFoundError):
        return "not found, or private: check the name, or set HF_TOKEN to a token that may read it"
    said = f" ({' '.join(error.server_message.split())})" if error.server_message else ""
    if status == 401:
        return f"the token is not accepted{said}: set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token has no permission{said}: use one that may write there"
    return f"the hub answers {status}{said}: try again later"
