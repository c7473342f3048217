"""The Hugging Face hub: models and artifacts fetched and checked, artifacts pushed with a card.

huggingface_hub does the talking, with the token of its environment (HF_TOKEN, or what
``hf auth login`` stored) and the address in HF_ENDPOINT. Two things are added to it: a large file
that was cut off continues where it stopped, in a later run too, and its SHA-256 is held against the
one the hub lists. Large files come one after the other over HTTP, not through Xet, which cannot
continue; those beyond huggingface_hub's limit for HTTP (50 GB) are left to it.
"""

import functools
import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
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

from llmpress.artifacts import PROVENANCE, folder_bytes, read_json, read_provenance, sha256, verify
from llmpress.errors import ArtifactError, LLMPressError, SourceError
from llmpress.sources import Location, matches

CARD = "README.md"
ARTIFACT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What an artifact may hold: nothing that is unpickled or run."""

_NOT_OURS = {CARD, ".gitattributes"}
_SECONDS_TO_ANSWER = 30.0
_UNREACHABLE = "the hub cannot be reached ({}); check the network, or use `path:` or `package:`"
_CUT = "the connection was cut ({}): run it again, it resumes where it stopped"
_NOT_SENT = "the upload failed ({}): run it again, files that arrived are not sent twice"


class HubError(LLMPressError):
    """The hub refused an upload or could not be reached, or the repository is unfit for it."""


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
        patterns: Globs as in `llmpress.sources.opened`.
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
    with _reported(repository, revision, SourceError, _UNREACHABLE):
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
    with _reported(repository, revision, SourceError, _CUT):
        blobs = cache / repo_folder_name(repo_id=repository, repo_type=repo_type) / "blobs"
        for file in files:
            if file.lfs is not None and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                url = hf_hub_url(repository, file.path, repo_type=repo_type, revision=commit)
                _fetch_large(url, file, blobs / file.lfs.sha256)
        # finds the large files in the cache already, fetches the small ones, and lays them out
        folder = Path(here(allow_patterns=[glob.escape(file.path) for file in files]))
    digests = {file.path: file.lfs.sha256 for file in files if file.lfs is not None}
    if damaged := _damaged(folder, digests):
        raise SourceError(
            f"hub repository {repository}: {', '.join(damaged)}: the SHA-256 is not the one the "
            "hub lists; the damaged copy is deleted, run it again to fetch it anew"
        )
    return folder


def fetch_artifact(repository_at_revision: str, cache: Path | str | None = None) -> Path:
    """Download an artifact and check every file against its provenance.json.

    Args:
        repository_at_revision: ``owner/name@revision``.
        cache: Where the hub's cache lies; by default where huggingface_hub keeps it.

    Returns:
        The artifact's folder, inside the cache: copy it before changing anything.

    Raises:
        ValueError: No revision is named.
        SourceError: As `download`.
        ArtifactError: No artifact, or a file is missing or differs from its provenance.
    """
    Location(hub=repository_at_revision)
    repository, _, revision = repository_at_revision.partition("@")
    record_folder = download(repository, revision, [PROVENANCE], cache=cache)
    digests = _digests(record_folder, f"hub repository {repository}")
    # the same commit, should a branch move on in between
    names = [PROVENANCE, *digests]
    folder = download(repository, record_folder.name, names, cache=cache)
    if missing := [name for name in digests if not (folder / name).is_file()]:
        raise ArtifactError(f"hub repository {repository}: {missing[0]} is missing; push it again")
    if damaged := _damaged(folder, digests):
        raise ArtifactError(
            f"hub repository {repository}: {', '.join(damaged)}: differs from {PROVENANCE}; run it "
            "again to fetch it anew, and if it stays so, it was changed after the upload"
        )
    return folder


def push_artifact(
    folder: Path | str,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = True,
    message: str | None = None,
) -> str:
    """Upload a compressed model or a compressed delta in one commit.

    Files of an earlier artifact in the same repository are removed, so that none is left beside the
    new ones. A README.md of the folder becomes the card; without one a card is written.

    Args:
        folder: The artifact; only its own files, its provenance and its card are uploaded.
        repository: ``owner/name``; created where it does not exist.
        revision: The branch, created where it does not exist; by default the main one.
        private: Whether a new repository is private. An existing public one is refused.
        message: The commit's message.

    Returns:
        The commit's address.

    Raises:
        ArtifactError: No such artifact, or its files are not those of its provenance.
        HubError: No token, no permission, no connection, or a repository of something else.
    """
    folder = Path(folder)
    verify(folder)
    digests = _digests(folder, str(folder))
    contents: dict[str, str | bytes] = {n: str(folder / n) for n in [*digests, PROVENANCE]}
    own_card = (folder / CARD).is_file()
    contents[CARD] = (
        str(folder / CARD) if own_card else model_card(folder, repository, revision).encode()
    )
    if repository.count("/") != 1:
        raise HubError(f"hub repository {repository}: write it as owner/name")
    if get_token() is None:
        raise HubError(
            f"hub repository {repository}: no token: set HF_TOKEN to one that may write, or run "
            "`hf auth login`"
        )
    with _reported(repository, revision or "main", HubError, _NOT_SENT):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        info = api.model_info(repository, revision=revision, timeout=_SECONDS_TO_ANSWER)
        if private and not info.private:
            raise HubError(
                f"hub repository {repository}: is public; pass private=False (--public) to publish "
                "there"
            )
        present = {sibling.rfilename for sibling in info.siblings or ()}
        stale = _stale(repository, str(info.sha), present) - contents.keys()
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=message or f"Upload {folder.name}",
            revision=revision,
        )
    return str(commit.commit_url)


def model_card(folder: Path, repository: str, revision: str | None = None) -> str:
    """Describe an artifact in Markdown, with the hub's metadata on top.

    Raises:
        ArtifactError: The folder is neither a compressed model nor a compressed delta.
    """
    record = read_provenance(folder)
    if not (folder / "layers.json").is_file():
        raise ArtifactError(f"{folder}: neither a compressed model nor a compressed delta")
    layers = read_json(folder / "layers.json")
    sizes, settings = layers["totals"], dict(record.get("settings", {}))
    method = settings.pop("method", "unknown")
    count = sum(layer["kind"] != "dense" for layer in layers["layers"])
    is_delta = (folder / "delta.json").is_file()
    if is_delta:
        base = read_json(folder / "delta.json")["base"]
        what, library = f"A fine-tuning delta of `{base['name']}`", "llmpress"
        origin, load = f"`{base['name']}`, {base['fingerprint']}", _LOAD_DELTA
        name = base["name"]
    else:
        config = read_json(folder / "config.json")
        name = (config.get("architectures") or [config.get("model_type", "model")])[0]
        what, library = f"A `{name}`", "transformers"
        origin, load = record.get("inputs", {}).get("model", "not recorded"), _LOAD_MODEL
    versions = record.get("packages", {})
    rows = {
        "method": f"`{method}`",
        "bits per weight, compressed layers": f"{sizes['bits_per_weight']:.2f}",
        "compressed layers": f"{count}, with {sizes['compressed_weights']:,} weights",
        "weights of the whole model": f"{sizes['model_weights']:,}",
        "size of the weights": f"{folder_bytes(folder) / 1e6:,.1f} MB",
        "settings": f"`{json.dumps({k: v for k, v in settings.items() if v is not None})}`",
        "base model (fingerprint)": origin,
        "this artifact (fingerprint)": record["fingerprint"],
        "made with": ", ".join(
            f"{k} {versions[k]}" for k in ("llmpress", "torch") if k in versions
        ),
    }
    at = f', revision="{revision}"' if revision else ""
    head = f"library_name: {library}\ntags: [llmpress, {method}]"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    code = load.format(repository=repository, at=at, revision=revision or "main", base=name)
    return (
        f"---\n{head}\n---\n# {repository.rpartition('/')[2]}\n\n"
        f"{what}, compressed by llmpress. The base model's licence applies.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n```python\n{code}```\n\n"
        f"`{PROVENANCE}` holds the SHA-256 of every file; "
        f'`llmpress.fetch_artifact("{repository}@{revision or "main"}")` checks them.\n'
    )


_LOAD_MODEL = """\
import llmpress  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}"{at})
"""

_LOAD_DELTA = """\
import llmpress

base = llmpress.load_model("folder/of/{base}")
model = llmpress.load_delta(base, llmpress.fetch_artifact("{repository}@{revision}"))
"""


def _tree(
    repository: str, revision: str, repo_type: Literal["model", "dataset"]
) -> tuple[str, list[RepoFile]]:
    """Resolve the revision to a commit and list its files."""
    api = HfApi()
    info = api.repo_info(
        repository, revision=revision, repo_type=repo_type, timeout=_SECONDS_TO_ANSWER
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


def _damaged(folder: Path, digests: Mapping[str, str]) -> list[str]:
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


def _digests(folder: Path, where: str) -> dict[str, str]:
    """Return what provenance.json says of the files, all of kinds that an artifact may hold."""
    digests = read_provenance(folder).get("files")
    if not isinstance(digests, dict) or not digests:
        raise ArtifactError(f"{where}: {PROVENANCE} lists no files; make the artifact again")
    for name in digests:
        plain = PurePosixPath(name).name == name and not set(name) & set("*?[]\\")
        if not plain or not matches(name, [*ARTIFACT_FILES, CARD]):
            raise ArtifactError(
                f"{where}: {PROVENANCE} lists {name!r}; an artifact holds only "
                f"{', '.join(ARTIFACT_FILES)}, in no folders"
            )
    return dict(digests)


def _stale(repository: str, commit: str, present: Iterable[str]) -> set[str]:
    """Return the files in a repository that an earlier artifact put there.

    Raises:
        HubError: There are files, but no artifact.
    """
    others = set(present) - _NOT_OURS
    if not others:
        return set()
    if PROVENANCE not in others:
        raise HubError(
            f"hub repository {repository}: holds {sorted(others)[0]} and no llmpress artifact; "
            "name another repository, or a new one"
        )
    record = download(repository, commit, [PROVENANCE])
    return others & set(_digests(record, f"hub repository {repository}"))


@contextmanager
def _reported(
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
