"""A bank's tenants, and a server over HTTP."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn
from tenants import Deltas, Edit, add_biases, grow, tenant, untie
from transformers import PreTrainedTokenizerFast

import llmpress
from llmpress.serving.api import build_app
from llmpress.serving.engine import Engine, Limits
from llmpress.serving.server import build_engine, listening_socket


@pytest.fixture(scope="session")
def deltas(
    tiny_model_folder: Path, compressed_delta: Path, tmp_path_factory: pytest.TempPathFactory
) -> Deltas:
    """Four tenants; only the first shares its embeddings with the base."""
    root = tmp_path_factory.mktemp("tenants")
    edits: dict[str, Edit] = {"grown": grow, "untied": untie, "biased": add_biases}
    made = {name: tenant(tiny_model_folder, root / name, edit) for name, edit in edits.items()}
    return {"tuned": compressed_delta, **made}


@dataclass(frozen=True)
class Served:
    """A server that runs in a thread of this process."""

    engine: Engine
    url: str

    @contextmanager
    def client(self, **options: Any) -> Iterator[openai.OpenAI]:
        """Yield OpenAI's client, which tries nothing twice."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        with openai.OpenAI(base_url=f"{self.url}/v1", **options) as client:
            yield client

    def client_of_many(self) -> openai.AsyncOpenAI:
        """Return OpenAI's client for requests side by side."""
        url = f"{self.url}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Ask without OpenAI's client."""
        return httpx2.get(f"{self.url}{path}", timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        """Ask without OpenAI's client."""
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def idle(self) -> None:
        """Wait until nothing runs."""
        for _ in range(500):
            if not self.engine.running and self.engine.batcher.is_idle():
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.engine.running} requests still run")


@contextmanager
def serving(engine: Engine, api_key: str | None = None) -> Iterator[Served]:
    """Serve until the context ends."""
    with listening_socket("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            build_app(engine, api_key), log_config=None, timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert server.started
        try:
            yield Served(engine, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with a chat template that shows tools."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}def {{ tool.function.name }}\n{% endfor %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tiny_model_folder: Path, deltas: Deltas, chat_tokenizer: Path) -> Iterator[Served]:
    """A server of the tiny model and its tenants, and one whose folder is damaged."""
    engine = build_engine(
        str(tiny_model_folder),
        [(name, str(folder)) for name, folder in deltas.items()],
        name="base",
        tokenizers={"base": chat_tokenizer},
        dtype=torch.float32,
        limits=Limits(requests=8, waiting=64, cache_tokens=2048, batch_tokens=64),
    )
    with serving(engine) as served:
        yield served


@pytest.fixture(scope="session")
def expected(tiny_model_folder: Path, deltas: Deltas) -> Callable[[str, str, int], str]:
    """What `generate` says greedily: of a tenant, to a prompt, so many tokens."""

    @cache
    def model(name: str) -> tuple[Any, Any]:
        tokenizer = llmpress.load_tokenizer(tiny_model_folder)
        if name == "base":
            return tokenizer, llmpress.load_model(tiny_model_folder)
        return tokenizer, llmpress.load_finetuned(tiny_model_folder, deltas[name])

    def answer(name: str, prompt: str, tokens: int) -> str:
        tokenizer, loaded = model(name)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found = loaded.generate(ids, max_new_tokens=tokens, do_sample=False)
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    return answer
