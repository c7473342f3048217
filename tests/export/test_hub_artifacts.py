"""Artifacts go up whole and private, and come back with the same bytes and the same logits."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import READER, WRITER, StandIn
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.artifacts import artifact_folder, read_json, read_provenance, write_json
from llmpress.core.errors import ArtifactError, HubError, SourceError
from llmpress.core.resume import BlockStore
from llmpress.data.sources.hub import download
from llmpress.deltas.applying import load_delta
from llmpress.deltas.compression import write_compressed_delta
from llmpress.deltas.extraction import write_delta
from llmpress.export.hub import fetch_artifact, model_card, push_artifact
from llmpress.methods.registry import method_class
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import load_model, skeleton

NAME = "team/small"
# the client's own way of sending a file's content, which its HTTP client is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "tiny"
    with artifact_folder(out, stage="test", settings={}, inputs={}) as folder:
        shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
        (folder / "additional_chat_templates").mkdir()
        for name in ("LICENSE", "own.tiktoken", "additional_chat_templates/tool_use.jinja"):
            (folder / name).write_text(name)
    return out


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model at 4 bits, as compress writes it."""
    out = tmp_path_factory.mktemp("compressed") / "rtn-4bit"
    source = Checkpoint(base)
    empty = skeleton(source)
    settings = {"num_bits": 4, "group_size": 16}
    weights = empty.num_parameters()
    layers = compress_layers(
        model_shapes(empty),
        source,
        method_class("rtn")(**settings),
        None,
        model_weights=weights,
        seed=0,
        device=torch.device("cpu"),
        store=BlockStore("test", {}, out.parent / "scratch"),
    )
    settings = {"method": "rtn", **settings, "note": None}
    with artifact_folder(out, stage="compress", settings=settings, inputs={"model": base}) as f:
        write_compressed_model(source, layers, weights, f)
    return out


@pytest.fixture(scope="module")
def delta(
    base: Path, tiny_finetuned_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("delta")
    with artifact_folder(root / "tuned", stage="test", settings={}, inputs={}) as folder:
        shutil.copytree(tiny_finetuned_folder, folder, dirs_exist_ok=True)
    with artifact_folder(root / "delta", stage="extract_delta", settings={}, inputs={}) as folder:
        write_delta(Checkpoint(base), Checkpoint(root / "tuned"), folder)
    settings = {"method": "svd", "keep": 0.5}
    out = root / "delta-svd"
    with artifact_folder(out, stage="compress_delta", settings=settings, inputs={}) as folder:
        write_compressed_delta(
            DeltaFolder(root / "delta", "delta"),
            method_class("svd")(keep=0.5),
            None,
            folder,
            method_name="svd",
            seed=0,
            store=BlockStore("test", {}, root / "scratch"),
        )
    return out


@pytest.fixture
def writer(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """The artifact, to be spoilt."""
    return shutil.copytree(artifact, tmp_path / "rtn-4bit")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    output: Tensor = model(windows).logits
    return output


def test_an_artifact_comes_back_byte_for_byte(
    artifact: Path, writer: StandIn, tmp_path: Path
) -> None:
    url = push_artifact(artifact, NAME, message="First")
    repository = writer.repositories[NAME]
    assert url == f"{writer.url}/{NAME}/commit/{repository.branches['main']}"
    assert repository.private
    stored = repository.files()
    assert stored.keys() - contents(artifact).keys() == {"README.md", ".gitattributes"}
    back = fetch_artifact(f"{NAME}@{url.rpartition('/')[2]}", cache=tmp_path / "own-cache")
    assert contents(back) == contents(artifact)
    assert back.is_relative_to(tmp_path / "own-cache")
    again = push_artifact(artifact, NAME)
    puts = [request for request in writer.seen if request.method == "PUT"]
    assert len(puts) == 1, "weights that the hub has are not sent twice"
    assert writer.repositories[NAME].files() == stored
    assert again.startswith(writer.url)


LOAD = f"""
import torch
import llmpress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
windows = load_file("windows.safetensors")["windows"]
model = AutoModelForCausalLM.from_pretrained("{NAME}", dtype=torch.float32)
with torch.no_grad():
    save_file({{"logits": model(windows).logits}}, "logits.safetensors")
"""


@pytest.mark.slow
def test_transformers_loads_it_by_name(
    artifact: Path,
    writer: StandIn,
    tmp_path: Path,
    tiny_windows: Tensor,
    elsewhere: Callable[[str], list[str]],
) -> None:
    push_artifact(artifact, NAME)
    save_file({"windows": tiny_windows[:2].contiguous()}, tmp_path / "windows.safetensors")
    elsewhere(LOAD)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    expected = logits(load_model(artifact), tiny_windows[:2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    fetched = [request.path.rpartition("/")[2] for request in writer.gets("resolve")]
    assert not any(name.endswith((".py", ".bin")) for name in fetched)


@pytest.mark.usefixtures("writer")
def test_a_delta_comes_back_and_is_applied(base: Path, delta: Path, tiny_windows: Tensor) -> None:
    push_artifact(delta, "team/delta", revision="v1")
    back = fetch_artifact("team/delta@v1")
    assert contents(back) == contents(delta)
    expected = logits(load_delta(load_model(base), delta), tiny_windows[:2])
    found = logits(load_delta(load_model(base), back), tiny_windows[:2])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found - logits(load_model(base), tiny_windows[:2])).abs().max() > 0.1


def test_the_card_says_what_it_is(artifact: Path, delta: Path, base: Path) -> None:
    card = model_card(artifact, NAME, "v2")
    bits = read_json(artifact / "layers.json")["totals"]["bits_per_weight"]
    for line in (
        "tags: [llmpress, rtn]",
        "A `LlamaForCausalLM`, compressed by llmpress.",
        "| method | `rtn` |",
        f"| bits per weight, compressed layers | {bits:.2f} |",
        '| settings | `{"num_bits": 4, "group_size": 16}` |',
        f"| base model (fingerprint) | {read_provenance(base)['fingerprint']} |",
        f'from_pretrained("{NAME}", revision="v2")',
    ):
        assert line in card
    card = model_card(delta, "team/delta")
    assert "A fine-tuning delta of `tiny`, compressed by llmpress." in card
    assert 'llmpress.load_delta(base, llmpress.fetch_artifact("team/delta@main"))' in card
    assert f"| base model (fingerprint) | `tiny`, {read_provenance(base)['fingerprint']} |" in card


def test_only_the_artifacts_own_files_go_up(copy: Path, writer: StandIn) -> None:
    (copy / "secret.env").write_text("KEY=1")
    (copy / "notes.json").write_text("{}")
    (copy / "scratch").mkdir()
    (copy / "README.md").write_text("---\ntags: [mine]\n---\nMy own card")
    push_artifact(copy, NAME)
    stored = writer.repositories[NAME].files()
    own = set(read_provenance(copy)["files"])
    assert stored.keys() == own | {"provenance.json", "README.md", ".gitattributes"}
    assert b"My own card" in stored["README.md"]


def test_an_earlier_artifact_leaves_nothing_behind(
    artifact: Path, delta: Path, writer: StandIn
) -> None:
    push_artifact(artifact, NAME)
    push_artifact(delta, NAME)
    stored = writer.repositories[NAME].files()
    own = set(read_provenance(delta)["files"])
    assert stored.keys() == own | {"provenance.json", "README.md", ".gitattributes"}
    assert fetch_artifact(f"{NAME}@main").is_dir()


def spoil(copy: Path, how: str) -> None:
    if how == "changed":
        with (copy / "model.safetensors").open("r+b") as file:
            file.write(b"x")
    elif how == "missing":
        (copy / "config.json").unlink()
    elif how == "no-provenance":
        (copy / "provenance.json").unlink()
    elif how == "no-layers":
        shutil.rmtree(copy)
        with artifact_folder(copy, stage="test", settings={}, inputs={}) as folder:
            write_json(folder / "other.json", {})
    elif how == "code":
        shutil.rmtree(copy)
        with artifact_folder(copy, stage="test", settings={}, inputs={}) as folder:
            (folder / "own.py").write_text("")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("changed", "model.safetensors"),
        ("missing", "config.json"),
        ("no-provenance", "provenance.json"),
        ("no-layers", "rtn-4bit"),
        ("code", "'own.py'"),
    ],
    ids=["changed", "missing", "no-provenance", "no-layers", "code"],
)
def test_no_artifact_is_not_pushed(how: str, named: str, copy: Path, writer: StandIn) -> None:
    spoil(copy, how)
    with pytest.raises(ArtifactError, match=re.escape(named)):
        push_artifact(copy, NAME)
    assert not writer.seen


@pytest.mark.parametrize(
    ("name", "token", "named"),
    [
        (NAME, None, "HF_TOKEN"),
        (NAME, READER, "permission .You don't have the rights"),
        ("team/mine", READER, "permission .You don't have the rights"),
        (NAME, "hf_expired", "Invalid credentials.* HF_TOKEN"),
        ("team/public", WRITER, "private=False .--public"),
        ("team/theirs", WRITER, r"model\.safetensors"),
        ("small", WRITER, "owner/name"),
        ("team/a--b", WRITER, "--"),
    ],
    ids=[
        "no-token",
        "may-not-create",
        "may-not-write",
        "bad-token",
        "public",
        "taken",
        "no-owner",
        "name",
    ],
)
def test_a_refused_upload_is_one_line(
    name: str,
    token: str | None,
    named: str,
    artifact: Path,
    hub: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.add("team/public", {})
    hub.add("team/mine", {}, private=True)
    hub.add("team/theirs", {"model.safetensors": b""}, private=True)
    with pytest.raises(HubError, match=f"^hub repository {name}: .*{named}"):
        push_artifact(artifact, name)
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_a_public_repository_is_made_and_used_when_asked_for(
    artifact: Path, delta: Path, writer: StandIn
) -> None:
    push_artifact(artifact, NAME, private=False)
    assert not writer.repositories[NAME].private
    push_artifact(delta, NAME, private=False)


def test_an_upload_without_a_network_is_one_line(
    artifact: Path, writer: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=f"^hub repository {NAME}: .*Connection refused"):
        push_artifact(artifact, NAME)
    assert not writer.seen


def test_a_refused_object_leaves_the_repository_as_it_was(
    artifact: Path, writer: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub_stand_in.sha", lambda _: "another")
    with pytest.raises(HubError, match="400"):
        push_artifact(artifact, NAME)
    assert writer.repositories[NAME].files().keys() == {".gitattributes"}


@pytest.mark.usefixtures("writer")
@pytest.mark.parametrize(
    ("spec", "error", "named"),
    [
        (NAME, ValueError, "owner/name@revision"),
        ("team/gone@main", SourceError, "hub repository team/gone"),
        ("team/plain@main", SourceError, r"team/plain .*provenance\.json"),
    ],
    ids=["unpinned", "missing", "no-artifact"],
)
def test_what_is_no_artifact_is_not_fetched(
    spec: str, error: type[Exception], named: str, hub: StandIn
) -> None:
    hub.add("team/plain", {"model.safetensors": b""})
    with pytest.raises(error, match=named):
        fetch_artifact(spec)


def changed(files: dict[str, bytes], name: str, content: bytes) -> dict[str, bytes]:
    return {**files, name: content}


def relisted(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """As if the artifact had been made with one file more."""
    record = json.loads(files["provenance.json"])
    record["files"][name] = hashlib.sha256(b"").hexdigest()
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(record["files"].items()))
    record["fingerprint"] = hashlib.sha256(lines.encode()).hexdigest()
    return {**files, "provenance.json": json.dumps(record).encode(), name: b""}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda files: changed(files, "config.json", b"{}"), "config.json"),
        (lambda files: changed(files, "model.safetensors", b"other"), "model.safetensors"),
        (lambda files: {n: c for n, c in files.items() if n != "layers.json"}, "layers.json"),
        (lambda files: relisted(files, "own.py"), "provenance.json lists 'own.py'"),
        (lambda files: relisted(files, "../../own.json"), "provenance.json lists '../../own.json'"),
    ],
    ids=["small-file", "weights", "missing", "code", "outside"],
)
def test_a_changed_artifact_is_refused(
    edit: Callable[[dict[str, bytes]], dict[str, bytes]],
    named: str,
    artifact: Path,
    hub: StandIn,
) -> None:
    commit = hub.add(NAME, edit(contents(artifact)))
    with pytest.raises(ArtifactError, match=re.escape(f"hub repository {NAME}: {named}")):
        fetch_artifact(f"{NAME}@main")
    hub.add(NAME, contents(artifact))
    assert contents(fetch_artifact(f"{NAME}@main")) == contents(artifact)
    assert commit in hub.repositories[NAME].commits


def test_a_branch_may_move_on_meanwhile(
    artifact: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moving(*arguments: Any, **options: Any) -> Path:
        folder = download(*arguments, **options)
        hub.add(NAME, changed(contents(artifact), "config.json", b"{}"))
        return folder

    hub.add(NAME, contents(artifact))
    monkeypatch.setattr("llmpress.export.hub.download", moving)
    assert contents(fetch_artifact(f"{NAME}@main")) == contents(artifact)


def test_no_earlier_download_is_trusted(artifact: Path, writer: StandIn) -> None:
    push_artifact(artifact, NAME)
    folder = fetch_artifact(f"{NAME}@main")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        fetch_artifact(f"{NAME}@main")
    assert contents(fetch_artifact(f"{NAME}@main")) == contents(artifact)
    assert len(writer.gets("model.safetensors")) == 2
    writer.down = 503
    assert fetch_artifact(f"{NAME}@main") == folder, "without the hub, what is cached"
