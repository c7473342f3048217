"""Artifacts on the Hugging Face hub: pushed with a card, fetched and verified."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from llmpress.core.artifacts import (
    MODEL_FILES,
    PROVENANCE,
    claim,
    folder_bytes,
    free_place,
    read_json,
    read_provenance,
    verify,
)
from llmpress.core.companions import COMPANIONS
from llmpress.core.errors import ArtifactError, HubError
from llmpress.core.records import DENSE, has_records, read_records
from llmpress.data.sources.hub import SECONDS_TO_ANSWER, delete_damaged, download, reported
from llmpress.data.sources.patterns import matches
from llmpress.data.sources.source import repository_and_revision
from llmpress.models.checkpoints.delta_files import HEADER

CARD = "README.md"
_NOT_OURS = {CARD, ".gitattributes"}
_NOT_SENT = "the upload failed ({}): run it again, files that arrived are not sent twice"


def fetch_artifact(
    repository_at_revision: str,
    *,
    out: Path | str | None = None,
    cache: Path | str | None = None,
    force: bool = False,
) -> Path:
    """Download an artifact and check every file against its provenance.json.

    Args:
        repository_at_revision: ``owner/name@revision``.
        out: Folder to copy it to, its own files only.
        cache: Where the hub's cache lies; by default where huggingface_hub keeps it.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``, or the artifact's folder inside the cache: copy it before changing anything.

    Raises:
        ValueError: No revision is named.
        SourceError: As `download`.
        ArtifactError: No artifact, a file that is missing or differs from its provenance, or
            ``out`` exists.
    """
    if out is not None:
        free_place(out, force=force)  # before anything is fetched
    repository, revision = repository_and_revision(repository_at_revision)
    record_folder = download(repository, revision, [PROVENANCE], cache=cache)
    digests = _digests(record_folder, f"hub repository {repository}")
    # the same commit, should a branch move on in between
    names = [PROVENANCE, *digests]
    folder = download(repository, record_folder.name, names, cache=cache)
    if missing := [name for name in digests if not (folder / name).is_file()]:
        raise ArtifactError(f"hub repository {repository}: {missing[0]} is missing; push it again")
    if damaged := delete_damaged(folder, digests):
        raise ArtifactError(
            f"hub repository {repository}: {', '.join(damaged)}: differs from {PROVENANCE}; run it "
            "again to fetch it anew, and if it stays so, it was changed after the upload"
        )
    if out is None:
        return folder
    with claim(out, force=force, inputs=(folder,)) as target:
        for name in names:
            (target.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target.folder / name)
        target.put()
    return Path(out)


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
    with reported(repository, revision or "main", HubError, _NOT_SENT):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        info = api.model_info(repository, revision=revision, timeout=SECONDS_TO_ANSWER)
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
    if not has_records(folder):
        raise ArtifactError(f"{folder}: neither a compressed model nor a compressed delta")
    records, settings = read_records(folder), dict(record.get("settings", {}))
    method = settings.pop("method", "unknown")
    count = sum(layer.kind != DENSE for layer in records.layers)
    is_delta = (folder / HEADER).is_file()
    if is_delta:
        base = read_json(folder / HEADER)["base"]
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
        "bits per weight, compressed layers": f"{records.totals.bits_per_weight:.2f}",
        "compressed layers": f"{count}, with {records.totals.compressed_weights:,} weights",
        "weights of the whole model": f"{records.totals.model_weights:,}",
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


def _digests(folder: Path, where: str) -> dict[str, str]:
    """Return what provenance.json says of the files, all of kinds that an artifact may hold."""
    digests = read_provenance(folder).get("files")
    if not isinstance(digests, dict) or not digests:
        raise ArtifactError(f"{where}: {PROVENANCE} lists no files; make the artifact again")
    for name in digests:
        if set(name) & set("*?[]\\") or not matches(name, [*MODEL_FILES, *COMPANIONS, CARD]):
            raise ArtifactError(
                f"{where}: {PROVENANCE} lists {name!r}; an artifact holds only "
                f"{', '.join((*MODEL_FILES, *COMPANIONS))}"
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
