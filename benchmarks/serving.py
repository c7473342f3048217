"""Load a server of a model and its tenants: latency, tokens a second, memory, right answers.

Clients ask one request after the other, of random tenants, prompts and lengths, streaming or not;
some go away in the middle. Every greedy answer is held against `generate` on base and delta.
"""

import asyncio
import csv
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx2
import openai
import psutil
import torch
import typer

import llmpress
from llmpress.deltas.applying import load_delta, remove_delta

WORDS = [
    "the",
    "model",
    "of",
    "a",
    "small",
    "river",
    "def",
    "return",
    "class",
    "import",
    "value",
    "stone",
    "light",
    "12",
    "+",
    "7",
    "=",
    "green",
]
OUT = Path(__file__).parent / "results/serving.csv"


@dataclass(frozen=True)
class Asked:
    """A request: of whom, what, and how much."""

    tenant: str
    prompt: str
    tokens: int


@dataclass
class Seen:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    answers: dict[Asked, set[str]] = field(default_factory=dict)
    tokens: int = 0
    gone: int = 0
    refused: int = 0


def requests(tenants: list[str], kinds: int, seed: int) -> list[Asked]:
    """Return different requests of mixed lengths."""
    draw = random.Random(seed)
    return [
        Asked(
            draw.choice(tenants),
            " ".join(draw.choices(WORDS, k=draw.choice([4, 16, 64]))),
            draw.choice([4, 16, 32]),
        )
        for _ in range(kinds)
    ]


async def client(url: str, asked: list[Asked], until: float, seed: int, seen: Seen) -> None:
    """Ask until the time is over."""
    draw = random.Random(seed)
    ask = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    async with ask:
        while time.monotonic() < until:
            each, stream, leaves = draw.choice(asked), draw.random() < 0.5, draw.random() < 0.05
            options = {"model": each.tenant, "prompt": each.prompt, "max_tokens": each.tokens}
            started = time.monotonic()
            try:
                if not stream and not leaves:
                    answer = await ask.completions.create(**options, temperature=0)
                    text = answer.choices[0].text
                else:
                    text, first = "", None
                    parts = await ask.completions.create(**options, temperature=0, stream=True)
                    async for part in parts:
                        first = first or time.monotonic()
                        text += part.choices[0].text
                        if leaves:
                            break
                    if leaves:
                        await parts.close()
                        seen.gone += 1
                        continue
                    seen.first_seconds.append((first or started) - started)
            except openai.RateLimitError:
                seen.refused += 1
                await asyncio.sleep(1)
                continue
            seen.seconds.append(time.monotonic() - started)
            seen.tokens += each.tokens
            seen.answers.setdefault(each, set()).add(text)


def expected(model: str, deltas: dict[str, str], asked: list[Asked]) -> dict[Asked, str]:
    """Return what `generate` says to each request."""
    loaded, tokenizer = llmpress.load_model(model), llmpress.load_tokenizer(model)
    answers = {}
    for tenant in sorted({each.tenant for each in asked}):
        if tenant in deltas:
            load_delta(loaded, deltas[tenant])
        for each in (each for each in asked if each.tenant == tenant):
            ids = tokenizer(each.prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                made = loaded.generate(ids, max_new_tokens=each.tokens, do_sample=False)
            answers[each] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        if tenant in deltas:
            remove_delta(loaded)
    return answers


@contextmanager
def server(model: str, deltas: dict[str, str], port: int) -> Iterator[subprocess.Popen[str]]:
    """Run `llmpress serve` in fp32 until the context ends."""
    command = [sys.executable, "-c", "from llmpress.cli import main; main()", "serve", model]
    command += ["--dtype=float32", f"--port={port}", "--name=base", "--max-requests=32"]
    command += [f"--delta={name}={folder}" for name, folder in deltas.items()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            while process.poll() is None:
                try:
                    httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except httpx2.TransportError:
                    time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def main(
    model: str,
    delta: Annotated[list[str], typer.Argument(help="Folders of compressed deltas, in turn.")],
    clients: int = 64,
    tenants: int = 16,
    minutes: float = 3,
    kinds: int = 60,
    port: int = 8765,
    out: Path = OUT,
) -> None:
    """Load a server and write a row of figures."""
    deltas = {f"t{n}": delta[n % len(delta)] for n in range(tenants)}
    asked, seen, memory = requests(["base", *deltas], kinds, 0), Seen(), []
    right = expected(model, deltas, asked)
    with server(model, deltas, port) as process:
        of_server = psutil.Process(process.pid)

        async def load() -> float:
            started = time.monotonic()
            url, until = f"http://127.0.0.1:{port}", started + 60 * minutes
            work = [client(url, asked, until, number, seen) for number in range(clients)]
            running = asyncio.gather(*work)
            while not running.done():
                memory.append(of_server.memory_info().rss / 1e6)
                await asyncio.wait([running], timeout=5)
            await running
            return time.monotonic() - started

        before = of_server.cpu_times()
        seconds = asyncio.run(load())
        after = of_server.cpu_times()
    wrong = sum(texts != {right[each]} for each, texts in seen.answers.items())
    cpu = after.user + after.system - before.user - before.system
    p50, p95, p99 = torch.tensor(seen.seconds).quantile(torch.tensor([0.5, 0.95, 0.99])).tolist()
    row = {
        "model": Path(model).name,
        "tenants": tenants,
        "clients": clients,
        "answers": len(seen.seconds),
        "gone": seen.gone,
        "refused": seen.refused,
        "different_requests": len(seen.answers),
        "differ_from_generate": wrong,
        "p50_s": round(p50, 2),
        "p95_s": round(p95, 2),
        "p99_s": round(p99, 2),
        "asked_tokens_per_s": round(seen.tokens / seconds, 1),
        "asked_tokens_per_cpu_s": round(seen.tokens / cpu, 1),
        "memory_mb_after_a_third": round(memory[len(memory) // 3]),
        "memory_mb_at_end": round(memory[-1]),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    for name, value in row.items():
        print(f"{name:26} {value}")
    is_new = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    if wrong:
        raise SystemExit(f"error: {wrong} requests had answers that generate does not give")


if __name__ == "__main__":
    typer.run(main)
