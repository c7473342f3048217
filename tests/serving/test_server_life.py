"""A server under way: who may ask, how many, tenants that come and go, clients that vanish."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from command_line import llmpress
from conftest import Served, serving
from tenants import Deltas

from llmpress.core.errors import ConfigError
from llmpress.serving.engine import Limits
from llmpress.serving.server import build_engine

pytestmark = pytest.mark.night  # what they look at depends on how long things take
Expected = Callable[[str, str, int], str]
PROMPT = "import asyncio\n\nclass Server:\n    def __init__(self, name): self.name = name\n" * 3
KEY = {"Authorization": "Bearer sesame"}
LONG = {"model": "base", "prompt": "def main():", "max_tokens": 400, "temperature": 0}


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something holds, for some seconds."""
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def requests(lines: list[logging.LogRecord]) -> list[dict[str, Any]]:
    """Return what was logged of requests."""
    return [line.__dict__["data"] for line in lines if line.getMessage() == "request"]


@pytest.fixture
def slow(small: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The same, each of whose tokens takes 10 ms."""
    kind = type(small.engine.model)
    forward = kind.forward

    def wait(*inputs: object, **options: object) -> object:
        time.sleep(0.01)
        return forward(*inputs, **options)

    monkeypatch.setattr(kind, "forward", wait)
    return small


@pytest.fixture
def small(tiny_model_folder: Path, deltas: Deltas) -> Iterator[Served]:
    """A server that takes one request at a time, and one that waits; with a key."""
    engine = build_engine(
        str(tiny_model_folder),
        [("tuned", str(deltas["tuned"]))],
        name="base",
        dtype=torch.float32,
        limits=Limits(requests=1, waiting=1, cache_tokens=1024, batch_tokens=32),
    )
    with serving(engine, "sesame") as served:
        yield served


def in_background(served: Served, body: dict[str, object]) -> threading.Thread:
    """Begin a request and wait until it runs."""
    running = served.engine.running
    options = {"headers": KEY}
    thread = threading.Thread(
        target=lambda: served.post("/v1/completions", body, **options), daemon=True
    )
    thread.start()
    while served.engine.running == running:
        time.sleep(0.005)
    return thread


def test_only_who_has_the_key_is_answered(small: Served) -> None:
    for path in ("/v1/models", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic sesame"}):
            answer = small.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert small.get(path, headers=KEY).status_code in (200, 501)
    for path in ("completions", "chat/completions", "load_delta", "unload_delta"):
        assert small.post(f"/v1/{path}", {}).status_code == 401
    assert small.get("/health").status_code == 200
    with small.client(api_key="sesame") as client:
        assert [model.id for model in client.models.list()] == ["base", "tuned"]
    with small.client(api_key="open") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_more_than_fit_are_told_to_come_again(slow: Served) -> None:
    threads = [in_background(slow, {**LONG, "max_tokens": 60}) for _ in range(2)]
    refused = slow.post("/v1/completions", LONG, headers=KEY)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    with slow.client(api_key="sesame", max_retries=9) as client:  # which waits as it is told
        options = {"prompt": "x", "max_tokens": 2}
        assert client.completions.create(model="base", **options).usage.completion_tokens == 2
    for thread in threads:
        thread.join()
    slow.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_generated_for(slow: Served, stream: bool) -> None:
    body = {**LONG, "stream": stream}
    if stream:
        with httpx2.stream("POST", f"{slow.url}/v1/completions", json=body, headers=KEY) as answer:
            next(answer.iter_lines())
            wait_until(lambda: slow.engine.running == 1)
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{slow.url}/v1/completions", json=body, headers=KEY, timeout=0.2)
    before = time.perf_counter()
    slow.idle()
    assert time.perf_counter() - before < 2  # of the 4 that all tokens take
    assert slow.engine.batcher.free_cache() == 1
    answer = slow.post("/v1/completions", {**LONG, "max_tokens": 3}, headers=KEY)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_what_takes_too_long_is_ended(slow: Served) -> None:
    slow.engine.limits.seconds = 0.05
    answer = slow.post("/v1/completions", LONG, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    parts = slow.post("/v1/completions", {**LONG, "stream": True}, headers=KEY).text.split("\n\n")
    assert json.loads(parts[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert parts[-2] == "data: [DONE]"
    slow.idle()


def test_tenants_come_and_go(
    small: Served, deltas: Deltas, expected: Expected, tmp_path: Path
) -> None:
    def post(path: str, **body: str) -> httpx2.Response:
        return small.post(f"/v1/{path}", body, headers=KEY)

    def said(name: str) -> str:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = small.post("/v1/completions", body, headers=KEY)
        return str(answer.json()["choices"][0]["text"])

    running = in_background(small, {**LONG, "max_tokens": 200})
    assert post("load_delta", name="new", source=str(deltas["biased"])).json()["id"] == "new"
    running.join()
    assert said("new") == expected("biased", PROMPT, 8)
    assert said("tuned") == expected("tuned", PROMPT, 8)
    again = post("load_delta", name="new", source=str(deltas["biased"]))
    assert (again.status_code, "'new'" in again.json()["error"]["message"]) == (400, True)
    for source in (tmp_path / "nowhere", tmp_path, deltas["biased"].parent / "finetuned"):
        refused = post("load_delta", name="other", source=str(source))
        assert refused.status_code == 400
        assert source.name in refused.json()["error"]["message"]
    running = in_background(small, {**LONG, "model": "new", "max_tokens": 100})
    assert post("unload_delta", name="new").json()["deleted"]  # after what runs
    assert not running.is_alive() or small.engine.running == 0
    for gone in (post("unload_delta", name="new"), post("unload_delta", name="neu")):
        assert gone.status_code == 404
    assert post("unload_delta", name="base").status_code == 400
    post("load_delta", name="new", source=str(deltas["untied"]))
    assert said("new") == expected("untied", PROMPT, 8)  # nothing is left of the other one


def test_prefixes_are_shared_within_a_tenant_alone(
    small: Served, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = small.engine.batcher.cache
    searched, found = cache.search_prefix_match, []

    def search(request: str, tokens: list[int]) -> int:
        found.append(searched(request, tokens))
        return int(found[-1])

    monkeypatch.setattr(cache, "search_prefix_match", search)
    for name in ("base", "tuned", "tuned", "base", "tuned"):
        body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        answer = small.post("/v1/completions", body, headers=KEY)
        assert answer.json()["choices"][0]["text"] == expected(name, PROMPT, 8)
    assert found[:2] == [0, 0]
    assert all(shared >= 32 for shared in found[2:])


def test_a_server_whose_worker_died_says_so(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(type(small.engine.model), "forward", fail)
    for _ in range(2):
        answer = small.post("/v1/completions", LONG, headers=KEY)
        assert answer.status_code == 503
        assert "no more memory" in answer.json()["error"]["message"]
    health = small.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "the worker has ended")
    refused = small.post("/v1/load_delta", {"name": "a", "source": "b"}, headers=KEY)
    assert refused.status_code in (400, 503)


def test_what_was_done_is_counted_and_logged(small: Served) -> None:
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logger = logging.getLogger("llmpress.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        body = {"model": "tuned", "prompt": "def", "max_tokens": 5}
        for stream in (False, True):
            small.post("/v1/completions", {**body, "stream": stream}, headers=KEY)
        small.post("/v1/completions", {**body, "model": "nobody"}, headers=KEY)
        small.idle()
        wait_until(lambda: len(requests(lines)) == 3)  # a line follows its answer
    finally:
        logger.removeHandler(handler)
    done = requests(lines)
    assert [(each["status"], each.get("tenant")) for each in done] == [
        (200, "tuned"),
        (200, "tuned"),
        (404, None),
    ]
    assert [each.get("completion_tokens") for each in done] == [5, 5, None]
    assert "nobody" in done[2]["error"]
    pytest.importorskip("prometheus_client")
    found = small.get("/metrics", headers=KEY).text
    assert 'llmpress_requests_total{status="200",tenant="tuned"} 2.0' in found
    assert 'llmpress_completion_tokens_total{tenant="tuned"} 10.0' in found
    assert 'llmpress_request_seconds_count{tenant="tuned"} 2.0' in found
    assert "llmpress_requests_running 0.0" in found


def test_a_full_cache_makes_requests_wait(
    tiny_model_folder: Path, deltas: Deltas, expected: Expected
) -> None:
    engine = build_engine(
        str(tiny_model_folder),
        [("tuned", str(deltas["tuned"]))],
        name="base",
        dtype=torch.float32,
        limits=Limits(requests=8, waiting=8, cache_tokens=256, batch_tokens=64),
    )
    asked = [("tuned" if n % 2 else "base", f"def f{n}():", 90) for n in range(6)]

    async def ask_all(served: Served) -> list[str]:
        async with served.client_of_many() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=name, prompt=prompt, max_tokens=tokens, temperature=0
                    )
                    for name, prompt, tokens in asked
                )
            )
        return [answer.choices[0].text for answer in answers]

    with serving(engine) as served:
        assert asyncio.run(ask_all(served)) == [expected(*each) for each in asked]
        whole = {"prompt": "def f0():", "max_tokens": 240, "temperature": 0}
        threads = [in_background(served, {"model": name, **whole}) for name in ("base", "tuned")]
        for thread in threads:
            thread.join()
        assert served.engine.batcher.is_alive()
        too_long = {"model": "base", "prompt": "x", "max_tokens": 300}
        refused = served.post("/v1/completions", too_long).json()
        assert "cache is 256 tokens" in refused["error"]["message"]


def test_a_damaged_tenant_is_refused_and_the_others_go_on(
    tiny_model_folder: Path,
    deltas: Deltas,
    tmp_path: Path,
    expected: Expected,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = shutil.copytree(deltas["tuned"], tmp_path / "damaged")
    (damaged / "delta.safetensors").write_bytes(b"none")
    logging.getLogger("llmpress.serving").propagate = True
    engine = build_engine(
        str(tiny_model_folder),
        [("bad", str(damaged)), ("good", str(deltas["tuned"]))],
        dtype=torch.float32,
        limits=Limits(cache_tokens=512),
    )
    [line] = [record.__dict__["data"] for record in caplog.records]
    assert (line["tenant"], "delta.safetensors" in line["error"]) == ("bad", True)
    assert list(engine.tenants) == [tiny_model_folder.name, "good"]
    with serving(engine) as served:
        body = {"prompt": "def", "max_tokens": 8, "temperature": 0}
        assert served.post("/v1/completions", {"model": "bad", **body}).status_code == 404
        answer = served.post("/v1/completions", {"model": "good", **body}).json()
        assert answer["choices"][0]["text"] == expected("tuned", "def", 8)


def test_names_are_not_given_twice(tiny_model_folder: Path, deltas: Deltas) -> None:
    folder = str(deltas["tuned"])
    for names in (["a", "a"], [tiny_model_folder.name]):
        with pytest.raises(ConfigError, match=f"'{names[-1]}'"):
            build_engine(str(tiny_model_folder), [(name, folder) for name in names])


def test_a_command_that_cannot_serve_says_so_in_a_line(
    tiny_model_folder: Path, deltas: Deltas, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in llmpress("serve", tiny_model_folder, "--port", port).error
    assert "--delta 'sums'" in llmpress("serve", tiny_model_folder, "--delta", "sums").error
    assert str(tmp_path) in llmpress("serve", tmp_path, "--port", 0).error
    twice = [f"--delta=a={deltas['tuned']}"] * 2
    assert "'a'" in llmpress("serve", tiny_model_folder, "--port", 0, *twice).error


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_what_is_not_installed_is_named(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [n for n in sys.modules if n.startswith("llmpress.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    error = llmpress("serve", tiny_model_folder, "--port", 0).error
    assert package in error
    assert "llmpress[serve]" in error


def test_without_prometheus_the_rest_is_served(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llmpress.serving.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with serving(small.engine) as served:
        refused = served.get("/metrics")
        assert served.get("/health").status_code in (200, 503)
    assert (refused.status_code, "llmpress[serve]" in refused.text) == (501, True)


@pytest.mark.slow
def test_a_command_ends_after_what_runs(tiny_model_folder: Path, deltas: Deltas) -> None:
    command = [sys.executable, "-c", "from llmpress.cli import main; main()", "serve"]
    command += [str(tiny_model_folder), f"--delta=tuned={deltas['tuned']}", "--port=0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LLMPRESS_API_KEY": "sesame"},
    ) as process:
        assert process.stdout is not None
        serving = json.loads(process.stdout.readline())
        assert serving["event"] == "serving"
        url = serving["address"]
        body = {**LONG, "model": "tuned", "max_tokens": 500, "stream": True}
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            ending = json.loads(process.stdout.readline())
            assert (ending["event"].partition(":")[0], ending["running"]) == ("ending", 1)
            try:
                refused = httpx2.post(f"{url}/v1/completions", json=LONG, headers=KEY).status_code
            except httpx2.ConnectError:
                refused = 503
            assert refused == 503
            parts = [line for line in lines if line]
        assert parts[-1] == "data: [DONE]"
        assert json.loads(parts[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        out, err = process.communicate(timeout=30)
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["event"] for event in events} == {"request", "ended"}
    assert [e["completion_tokens"] for e in events if e.get("status") == 200] == [500]
    assert process.returncode == 0
    assert "Traceback" not in err


def test_what_the_server_got_wrong_is_an_error_in_the_same_form(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(small.engine, "begin", fail)
    answer = small.post("/v1/completions", LONG, headers=KEY)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "disk gone" not in answer.text
