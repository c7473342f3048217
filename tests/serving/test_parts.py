"""The parts of a server without one: attention, texts, calls, sources."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Served, serving
from hub_stand_in import StandIn
from tenants import Deltas
from tiny_models import architecture_config
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import llmpress
from llmpress import DeltaBank
from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.serving.answers import Chat
from llmpress.serving.batching import Batcher, Progress
from llmpress.serving.engine import Limits, Piece
from llmpress.serving.sampling import Sampler
from llmpress.serving.server import build_engine
from llmpress.serving.sources import delta_folder
from llmpress.serving.text import TextStream


async def generated(batcher: Batcher, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What a batcher generates to prompts at once."""

    async def one(prompt: list[int]) -> list[int]:
        told: asyncio.Queue[Progress] = asyncio.Queue()
        greedy = GenerationConfig(do_sample=False)
        sampler = Sampler.of(batcher.model, greedy, prompt_tokens=len(prompt))
        options = {"max_tokens": tokens, "end_tokens": [], "told": told.put_nowait}
        batcher.add(None, prompt, sampler, **options)
        while not (progress := await told.get()).finished:
            pass
        assert progress.error is None
        return progress.tokens

    batcher.start()
    try:
        return await asyncio.gather(*map(one, prompts))
    finally:
        await asyncio.to_thread(batcher.stop)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_sequences_are_attended_as_generate_does(architecture: str) -> None:
    """Prompts in parts, longer than a sliding window, beside shorter ones."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(architecture_config(architecture)).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (90, 5, 40, 33)]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=9, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    batcher = Batcher(DeltaBank(model), max_requests=4, cache_tokens=1024, max_batch_tokens=24)
    assert asyncio.run(generated(batcher, prompts, 9)) == expected
    again = model.generate(torch.tensor([prompts[1]]), max_new_tokens=9, do_sample=False)
    assert again[0, len(prompts[1]) :].tolist() == expected[1]  # the model is given back


def test_what_cannot_be_batched_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(architecture_config("mamba"))
    with pytest.raises(ConfigError, match="Mamba"):
        Batcher(DeltaBank(model), max_requests=4, cache_tokens=256, max_batch_tokens=24)


@pytest.mark.parametrize("step", [1, 3])
def test_texts_end_before_stops_whatever_the_pieces(tiny_model_folder: Path, step: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)
    text = "class Größe: pass  # ünd 値\nEND of it"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces(*stops: str, end: int | None = None) -> list[str]:
        stream, given = TextStream(tokenizer, stops), tokens[:end]
        found = []
        for start in range(0, len(given), step):
            last = start + step >= len(given)
            found.append(stream.add(given[start : start + step], last=last))
        return found

    assert "".join(pieces()) == text
    assert len(list(filter(None, pieces()))) > 4
    assert "".join(pieces("END", "nothing")) == text[: text.index("END")]
    assert "".join(pieces("ass  # ü")) == text[: text.index("ass  #")]
    assert "".join(pieces("END of it!")) == text  # which only seemed to begin
    assert "".join(pieces(text[:3])) == ""
    assert not any("END"[:n] == part[-n:] for part in pieces("END")[:-1] for n in (1, 2) if part)
    for end in range(1, len(tokens)):
        whole = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert "".join(pieces(end=end)) == whole


TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<end>", "content": "text"},
    },
}


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_calls_and_thoughts_are_told_apart(tiny_model_folder: Path, step: int) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)
    call = {"name": "look_up", "arguments": {"word": "größe"}}
    text = f"<think>hm</think>Let me.\n<tool_call>\n{json.dumps(call)}\n</tool_call><end>"
    prompt = tokenizer("user: hi\nassistant:")["input_ids"]
    chat = Chat("m", tokenizer, TEMPLATE, prompt, None, 1)
    parts = chat.first(0)
    for start in range(0, len(text), step):
        last = start + step >= len(text)
        piece = Piece(text[start : start + step], [], start, "stop" if last else None)
        parts += chat.parts(0, piece)
    choice = chat.joined(0, parts)
    message = choice["message"]
    assert (message["content"].strip(), message["reasoning_content"]) == ("Let me.", "hm")
    [made] = message["tool_calls"]
    assert made["function"]["name"] == "look_up"
    assert json.loads(made["function"]["arguments"]) == call["arguments"]
    assert choice["finish_reason"] == "tool_calls"
    cut = Chat("m", tokenizer, TEMPLATE, prompt, None, 1)
    ended = cut.parts(0, Piece('<tool_call>{"name": "lo', [], 4, "length"))
    assert cut.joined(0, ended)["finish_reason"] == "length"


def test_a_model_without_a_chat_template_says_so(tiny_model_folder: Path) -> None:
    engine = build_engine(
        str(tiny_model_folder),
        [],
        name="base",
        dtype=torch.float32,
        limits=Limits(cache_tokens=256),
    )
    with serving(engine) as served:
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
        answer = served.post("/v1/chat/completions", body)
    assert (answer.status_code, "template" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("method", ["rtn", "cluscomp"])
def test_compressed_bases_say_what_generate_says(
    compressed: Callable[[str], Path], method: str
) -> None:
    folder, prompt = compressed(method), "def main():"
    model, tokenizer = llmpress.load_model(folder), llmpress.load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    limits = Limits(cache_tokens=256)
    with serving(build_engine(str(folder), [], dtype=torch.float32, limits=limits)) as served:
        body = {"model": folder.name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = served.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.night
def test_clients_that_come_and_vanish_leave_nothing(server: Served) -> None:
    server.idle()
    names = list(server.engine.tenants)

    async def ask(number: int) -> None:
        options = {"prompt": f"def f{number % 7}():", "max_tokens": 4 + number % 40}
        async with server.client_of_many() as client:
            options |= {"model": names[number % len(names)], "temperature": 0}
            if number % 3:
                answer = await client.completions.create(**options)
                assert answer.usage.completion_tokens <= options["max_tokens"]
                return
            parts = await client.completions.create(**options, stream=True)
            async for _ in parts:
                break
            await parts.close()

    async def ask_all() -> None:
        await asyncio.gather(*map(ask, range(40)))

    asyncio.run(ask_all())
    server.idle()
    assert server.engine.batcher.free_cache() == 1
    assert server.get("/health").json() == {"status": "ok", "running": 0}


def test_deltas_come_from_folders_and_the_hub(deltas: Deltas, hub: StandIn, tmp_path: Path) -> None:
    assert delta_folder(str(deltas["tuned"])) == deltas["tuned"]
    with pytest.raises(ArtifactError, match="nowhere"):
        delta_folder(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="team/delta"):
        delta_folder("hub:team/delta@main")
    with pytest.raises(ValueError, match="no-revision"):
        delta_folder("hub:no-revision")
    assert hub.seen


@pytest.mark.parametrize("source", ["dvc:", "dvc:@team", "dvc:#path"])
def test_sources_of_no_form_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(source)):
        delta_folder(source)


@pytest.mark.slow
def test_deltas_come_from_a_remote_of_dvc(
    deltas: Deltas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, cache = tmp_path / "project", tmp_path / "kept"
    shutil.copytree(deltas["tuned"], project / "small")
    monkeypatch.chdir(project)
    monkeypatch.setenv("LLMPRESS_CACHE", str(cache))

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "remote", "add", "team", str(tmp_path / "remote"))
    run("dvc", "add", "-q", "small")
    run("dvc", "push", "-q", "-r", "team")
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "small")
    folder = delta_folder("dvc:small@team")
    assert folder.is_relative_to(cache)
    assert {f.name for f in folder.iterdir()} == {f.name for f in deltas["tuned"].iterdir()}
    shutil.rmtree(tmp_path / "remote/files", ignore_errors=True)
    assert delta_folder("dvc:small@team") == folder  # kept
    with pytest.raises(SourceError, match="elsewhere"):
        delta_folder("dvc:elsewhere@team")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="dvc is not installed"):
        delta_folder("dvc:small@team")
