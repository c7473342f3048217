"""Models from the hub: whole, continued where they were cut, checked, or refused with one line."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_stand_in import READER, WRITER, Answer, StandIn
from huggingface_hub import constants
from safetensors.torch import save

from llmpress.core.errors import SourceError
from llmpress.data.sources.hub import download
from llmpress.data.sources.pretrained import ModelSource, write_model
from llmpress.data.sources.source import Source, opened

CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 1}).encode()
WEIGHTS = "model.safetensors"
MANY = torch.arange(250_000, dtype=torch.float32)
MODEL = {"config.json": CONFIG, WEIGHTS: save({"a": MANY})}
SHARDED = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": save({"a": torch.zeros(3)}),
    "model-00002-of-00002.safetensors": save({"b": torch.ones(3)}),
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
}
NOT_WANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.00.pth": b"pickle",
    "modeling_own.py": b"raise SystemExit('run')",
    "onnx/model.safetensors": b"another",
    ".gitattributes": b"",
}


def fetch(out: Path, hub_name: str) -> dict[str, str]:
    """Fetch as fetch_model does; returns the origin."""
    source = ModelSource(license="MIT", hub=hub_name)
    out.mkdir(exist_ok=True)
    with opened(source, source.patterns()) as fetched:
        write_model(source, fetched, out)
        return fetched.origin


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def blobs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("models--*/blobs/*"))


def refusal(tmp_path: Path, hub_name: str = "team/model@main") -> str:
    with pytest.raises(SourceError) as caught:
        fetch(tmp_path / "out", hub_name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sharded_model_comes_whole_and_nothing_else_with_it(hub: StandIn, tmp_path: Path) -> None:
    commit = hub.add("team/model", SHARDED | NOT_WANTED)
    hub.add("team/model", {"config.json": b"{}"}, branch="other")
    origin = fetch(tmp_path / "out", "team/model@main")
    assert origin == {"hub": "team/model@main", "commit": commit}
    assert contents(tmp_path / "out") == SHARDED
    asked = " ".join(request.path for request in hub.seen if "/api/" not in request.path)
    assert not any(name in asked for name in NOT_WANTED)


def test_xet_is_not_asked_where_it_is_installed(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.add("team/model", SHARDED)
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == SHARDED
    assert not any("xet" in request.path for request in hub.seen)


def test_what_is_cached_is_not_fetched_again(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    fetch(tmp_path / "out", "team/model@main")
    first = len(hub.gets(WEIGHTS))
    fetch(tmp_path / "out", "team/model@main")
    assert (first, len(hub.gets(WEIGHTS))) == (1, 1)


@pytest.mark.usefixtures("impatient")
def test_a_cut_download_continues_in_the_same_run(
    hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("team/model", MODEL)
    hub.cuts[WEIGHTS] = [400_000]
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == MODEL
    first, second = hub.gets(WEIGHTS)
    kept = 400_000 // 65536 * 65536
    assert (first.range, second.range) == (None, f"bytes={kept}-")
    assert second.sent == len(MODEL[WEIGHTS]) - kept
    assert f"{WEIGHTS}: 100%" in capsys.readouterr().err, "progress is shown, terminal or not"


@pytest.mark.usefixtures("impatient")
def test_a_cut_download_continues_in_the_next_run(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    hub.cuts[WEIGHTS] = [400_000] + [0] * 12
    rest = len(MODEL[WEIGHTS]) - 393_216
    assert f"expected {rest}" in refusal(tmp_path)
    assert not list((tmp_path / "out").iterdir())
    hub.seen.clear()
    hub.cuts.clear()
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == MODEL
    (request,) = hub.gets(WEIGHTS)
    assert request.range == "bytes=393216-"
    assert request.sent == rest
    assert not [path for path in blobs(tmp_path) if path.name.endswith(".incomplete")]


def test_a_reset_connection_continues_as_well(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    hub.cuts[WEIGHTS] = [400_000]
    hub.resets = True
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == MODEL
    assert [bool(request.range) for request in hub.gets(WEIGHTS)] == [False, True]


@pytest.mark.usefixtures("impatient")
def test_a_small_file_that_is_cut_is_named_too(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    hub.cuts["config.json"] = [5] * 9
    assert "peer closed connection" in refusal(tmp_path)


def test_leftovers_longer_than_the_file_are_dropped(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    fetch(tmp_path / "out", "team/model@main")
    (blob,) = [path for path in blobs(tmp_path) if path.stat().st_size > 1000]
    blob.rename(blob.with_name(f"{blob.name}.llmpress.incomplete"))
    with blob.with_name(f"{blob.name}.llmpress.incomplete").open("ab") as file:
        file.write(b"more")
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == MODEL


def test_a_wrong_checksum_is_refused_and_fetched_anew(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", SHARDED)
    bad = "model-00002-of-00002.safetensors"
    hub.damaged[bad] = SHARDED[bad][:-1] + b"x"
    assert f": {bad}: " in refusal(tmp_path)
    assert not list((tmp_path / "out").iterdir())
    hub.damaged.clear()
    hub.seen.clear()
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == SHARDED
    assert len(hub.gets(bad)) == 1
    assert not hub.gets("model-00001-of-00002.safetensors"), "the good shard stays"


@pytest.mark.parametrize(
    ("name", "token", "named"),
    [
        ("team/missing@main", None, "HF_TOKEN"),
        ("team/missing@main", READER, "HF_TOKEN"),
        ("team/model@v9", None, "'v9'"),
        ("team/gated@main", None, "gated.* HF_TOKEN"),
        ("team/gated@main", READER, "gated.* account"),
        ("team/model@main", "hf_expired", "Invalid credentials.* HF_TOKEN"),
        ("team/na--me@main", None, "--"),
        ("team/pickled@main", None, r"model\*\.safetensors.*`path:`"),
        ("team/empty@main", None, r"model\*\.safetensors"),
    ],
    ids=[
        "missing",
        "missing-with-token",
        "revision",
        "gated-401",
        "gated-403",
        "bad-token",
        "bad-name",
        "pickle-only",
        "empty",
    ],
)
def test_every_mistake_is_one_line(
    name: str,
    token: str | None,
    named: str,
    hub: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.add("team/model", MODEL)
    hub.add("team/gated", MODEL, gated=True)
    hub.add("team/pickled", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    hub.add("team/empty", {".gitattributes": b""})
    repository = name.partition("@")[0]
    assert re.search(f"{repository}.*{named}", refusal(tmp_path, name))
    assert not hub.gets("pytorch_model.bin")


def test_a_gated_or_private_model_comes_with_the_right_token(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("team/model", MODEL, gated=True, private=True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    fetch(tmp_path / "out", "team/model@main")
    assert contents(tmp_path / "out") == MODEL


def test_without_the_hub_the_cache_serves(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("team/model", MODEL | NOT_WANTED)
    hub.down = 503
    assert "503" in refusal(tmp_path)
    hub.down = 0
    fetch(tmp_path / "out", "team/model@main")
    hub.down = 503
    assert fetch(tmp_path / "out", "team/model@main")["commit"] == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(tmp_path / "out", "team/model@main")["commit"] == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "cache/models--team--model/snapshots" / commit / WEIGHTS).unlink()
    assert "503" in refusal(tmp_path), "an incomplete copy is not taken for the model"


def test_a_refusal_is_no_reason_to_use_the_cache(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    fetch(tmp_path / "out", "team/model@main")
    del hub.repositories["team/model"]
    assert "team/model" in refusal(tmp_path)


def test_no_network_and_offline_mode_say_so(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "team/model" in (line := refusal(tmp_path))
    assert "[Errno 111]" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(tmp_path)
    assert not hub.seen


def test_too_many_requests_are_passed_on(hub: StandIn, tmp_path: Path) -> None:
    hub.add("team/model", MODEL)
    hub.answers["main"] = Answer(429)
    assert "429" in refusal(tmp_path)


def test_a_full_disk_is_not_taken_for_the_network(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    hub.add("team/model", MODEL)
    monkeypatch.setattr("llmpress.data.sources.hub.http_get", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(tmp_path / "out", "team/model@main")


def test_data_sets_come_with_their_folders(hub: StandIn) -> None:
    hub.add("team/texts", {"data/a/1.jsonl": b"1", "data/2.jsonl": b"2", "data/run.py": b""})
    source = Source(license="MIT", hub="team/texts@main")
    with opened(source, ["data/**/*.jsonl"], hub_type="dataset") as source:
        assert [file.read_bytes() for file in source.files] == [b"2", b"1"]
        assert not list(source.folder.rglob("*.py"))


def test_files_beyond_the_limit_of_http_are_left_to_the_client(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("team/model", MODEL)
    monkeypatch.setattr("llmpress.data.sources.hub.http_get", None)
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 1000)
    with pytest.raises(ValueError, match="hf_xet"):
        download("team/model", "main", ["*"])
    assert not hub.gets(WEIGHTS)


SCRIPT = """
import contextlib, io, json, runpy, sys
import huggingface_hub.file_download as client
client.time = type("impatient", (), {"sleep": lambda _: None})
for name in NAMES:
    sys.argv = ["fetch_model.py", name]
    err, out, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            runpy.run_path(FILE, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([name, code, err.getvalue(), out.getvalue()]))
"""
WRONG = {
    "missing": "team/missing.* HF_TOKEN",
    "gated": "team/gated.* account",
    "norevision": "team/sharded.* 'v9'",
    "pickled": r"team/pickled@main.* model\*\.safetensors",
    "own-code": "team/own-code@main.* architecture",
    "damaged": r"team/damaged: model-damaged\.safetensors: ",
    "cut": "team/cut",
    "unpinned": r"models\.unpinned\.hub: .*'team/sharded'",
}


@pytest.mark.slow
def test_the_script_fetches_or_says_why_not(
    hub: StandIn, tmp_path: Path, elsewhere: Callable[[str], list[str]]
) -> None:
    big = save({"a": torch.zeros(6_000_000)})  # more than two of the client's chunks of 10 MiB
    hub.add("team/sharded", SHARDED | NOT_WANTED)
    hub.add("team/gated", MODEL, gated=True)
    hub.add("team/pickled", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    own = json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}).encode()
    hub.add("team/own-code", {"config.json": own, "own.py": b"", "model-own.safetensors": b"own"})
    hub.add("team/damaged", {"config.json": CONFIG, "model-damaged.safetensors": b"good"})
    hub.damaged["model-damaged.safetensors"] = b"evil"
    hub.add("team/cut", {"config.json": CONFIG, "model-cut.safetensors": big})
    hub.cuts["model-cut.safetensors"] = [22_000_000] + [0] * 12
    names = {"norevision": "team/sharded@v9", "unpinned": "team/sharded"}
    params = {
        name: {"license": "MIT", "hub": names.get(name, f"team/{name}@main")}
        for name in ["sharded", *WRONG]
    }
    (tmp_path / "params.yaml").write_text(json.dumps({"models": params}))
    order = ["--help", "sharded", *WRONG, "cut"]
    script = str(Path(__file__).parents[3] / "workflow/scripts/fetch_model.py")
    rows = [
        json.loads(line)
        for line in elsewhere(SCRIPT.replace("NAMES", repr(order)).replace("FILE", repr(script)))
    ]
    assert [row[0] for row in rows] == order
    (_, code, _, text), (_, good, bars, _), *wrong, (_, resumed, more, _) = rows
    assert (code, good, resumed) == (0, 0, 0)
    assert "HF_TOKEN" in text
    assert "resumes" in text
    assert "model-00001-of-00002.safetensors: 100%" in bars
    assert "model-cut.safetensors: 100%" in more
    for (name, code, err, _), named in zip(wrong, WRONG.values(), strict=True):
        assert code == 1, name
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert re.search(named, line)
        assert "Traceback" not in err
    assert not hub.gets("model-own.safetensors"), "refused before the weights are fetched"
    assert hub.gets("model-cut.safetensors")[-1].range == "bytes=20971520-"
    assert sorted(p.name for p in (tmp_path / "data/models").iterdir()) == ["cut", "sharded"]
    fetched = contents(tmp_path / "data/models/sharded")
    assert fetched.keys() - SHARDED.keys() == {"source.json", "provenance.json"}
    assert {name: fetched[name] for name in SHARDED} == SHARDED
