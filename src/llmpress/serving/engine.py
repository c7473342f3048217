"""Tenants, and requests to them: admitted or refused, generated, cancelled."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmpress.core.errors import ConfigError, LLMPressError
from llmpress.models.loading import load_tokenizer
from llmpress.serving.bank import DeltaBank
from llmpress.serving.batching import Batcher, Progress, WorkerDiedError
from llmpress.serving.rows import Name
from llmpress.serving.sampling import Chosen, Sampler
from llmpress.serving.sources import delta_folder, has_tokenizer
from llmpress.serving.text import TextStream

DEFAULT_TOKENS = 16
"""Of a plain completion, as OpenAI has it; a chat goes on as long as there is room."""


class BusyError(LLMPressError):
    """More requests than the server takes at once."""


class EndingError(LLMPressError):
    """The server ends and takes no more requests."""


class TooLongError(LLMPressError):
    """A prompt and its answer do not fit."""


class UnknownModelError(LLMPressError):
    """A name that nothing is served under."""


@dataclass
class Limits:
    """What a server takes.

    Attributes:
        requests: Computed at once.
        waiting: That wait for others to end; further ones are refused.
        cache_tokens: Tokens of all requests whose keys and values there is room for.
        batch_tokens: Computed at once; longer prompts are computed in parts.
        seconds: That a request may take.
    """

    requests: int = 32
    waiting: int = 128
    cache_tokens: int = 16384
    batch_tokens: int = 512
    seconds: float = 600.0


@dataclass
class Tenant:
    """A name that requests may give, and what is generated with.

    Attributes:
        name: As in requests.
        delta: The bank's name of its delta; None for the base.
        tokenizer: With the chat template.
        vocabulary: Tokens that its embeddings know.
        created: When it was loaded, seconds since 1970.
        running: Requests of it.
        leaving: Whether it takes no more.
    """

    name: str
    delta: Name
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    created: int = field(default_factory=lambda: int(time.time()))
    running: int = 0
    leaving: bool = False


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_tokens: At most; None for as many as there is room for.
        sampling: Attributes of a ``GenerationConfig``; what is None is the model's own.
        seed: Of the draws.
        stops: Strings that end it.
        num_logprobs: Most probable tokens to tell of each; None for no log probabilities.
        special: Whether special tokens are part of the text.
    """

    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stops: Sequence[str] = ()
    num_logprobs: int | None = None
    special: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: That came since the last part.
        chosen: The log probabilities of its tokens.
        tokens: Generated so far.
        finish_reason: ``stop`` or ``length`` with the last part.
        token_ids: All of them, with the last part.
    """

    text: str
    chosen: list[Chosen]
    tokens: int
    finish_reason: str | None
    token_ids: list[int] | None = None


class Engine:
    """A base and its tenants, generating for many requests at once.

    Attributes:
        ending: Whether no more requests are taken.

    Args:
        bank: The base without deltas.
        tokenizer: Of the base, and of tenants that have none of their own.
        name: That the base has in requests.
        limits: What is taken at once.

    Raises:
        ConfigError: The model cannot be served.
    """

    def __init__(
        self, bank: DeltaBank, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits
    ) -> None:
        self.limits = limits
        self._bank = bank
        self.model: Any = bank.model
        self._tokenizer = tokenizer
        vocabulary = bank.vocabulary(None)
        self.tenants = {name: Tenant(name, None, tokenizer, vocabulary)}
        self.base = name
        self._settings: GenerationConfig = copy(self.model.generation_config)
        self.batcher = Batcher(
            bank,
            max_requests=limits.requests,
            cache_tokens=limits.cache_tokens,
            max_batch_tokens=limits.batch_tokens,
        )
        config = self.model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.ending = False
        self._changing = asyncio.Lock()

    def add(self, name: str, source: str, tokenizer: Path | None = None) -> None:
        """Serve a delta; not while the engine runs.

        Raises:
            LLMPressError: A name that is taken, or a delta that cannot be used.
        """
        if name in self.tenants:
            raise ConfigError(f"two models are called {name!r}; give one another name")
        folder = delta_folder(source)
        own = tokenizer or (folder if has_tokenizer(folder) else None)
        tools = load_tokenizer(own) if own else self._tokenizer
        self._bank.add(name, folder)
        try:
            self._bank.use_packed([name], [name])
            vocabulary = self._bank.vocabulary(name)
        except BaseException:
            self._bank.use(None)
            self._bank.remove(name)
            raise
        self.tenants[name] = Tenant(name, name, tools, vocabulary)

    async def load(self, name: str, source: str) -> None:
        """Serve a delta while others are; no batch runs while it is put into memory.

        Raises:
            LLMPressError: As `add`.
        """
        async with self._changing:
            await asyncio.to_thread(self._paused_add, name, source)

    def _paused_add(self, name: str, source: str) -> None:
        folder = str(delta_folder(source))
        with self.batcher.paused():
            self.add(name, folder)

    async def unload(self, name: str) -> None:
        """Take no more requests for a delta, wait for those that run, and forget it.

        Raises:
            UnknownModelError: No delta has this name.
        """
        tenant = self.tenant(name)
        if tenant.delta is None:
            raise ConfigError(f"{name!r} is the base and stays")
        tenant.leaving = True
        async with self._changing:
            while tenant.running:
                await asyncio.sleep(0.02)
            await asyncio.to_thread(self._paused_remove, name)
            del self.tenants[name]

    def _paused_remove(self, name: str) -> None:
        with self.batcher.paused():
            self._bank.use_packed([None], [None])
            self._bank.remove(name)
            self.batcher.forget(name)

    def tenant(self, name: str) -> Tenant:
        """Return what a request names.

        Raises:
            EndingError: The server ends.
            UnknownModelError: Nothing is served under that name.
        """
        if self.ending:
            raise EndingError("the server is ending and takes no more requests")
        found = self.tenants.get(name)
        if found is None or found.leaving:
            known = ", ".join(n for n, t in self.tenants.items() if not t.leaving)
            raise UnknownModelError(f"the model {name!r} does not exist; there are {known}")
        return found

    @property
    def running(self) -> int:
        """Requests that are computed or wait."""
        return sum(tenant.running for tenant in self.tenants.values())

    def check_room(self, count: int) -> None:
        """Check that so many requests may begin.

        Raises:
            BusyError: There are too many.
        """
        most = self.limits.requests + self.limits.waiting
        if self.running + count > most:
            raise BusyError(f"{self.running} requests run or wait, {most} may; try again later")

    def begin(self, tenant: Tenant, tokens: Sequence[int], settings: Settings) -> "Answer":
        """Begin to generate an answer.

        Args:
            tenant: Whose.
            tokens: The prompt.
            settings: Of the answer.

        Raises:
            BusyError: Too many requests.
            TooLongError: Prompt and answer exceed the context or the cache.
            ConfigError: An empty prompt, or a token that the tenant does not know.
            WorkerDiedError: Nothing is generated any more.
        """
        self.check_room(1)
        if not tokens:
            raise ConfigError("the prompt has no token; say more")
        if unknown := [token for token in tokens if not 0 <= token < tenant.vocabulary]:
            raise ConfigError(f"{tenant.name} has {tenant.vocabulary} tokens, not {unknown[0]}")
        max_tokens = self._max_tokens(len(tokens), settings.max_tokens)
        ends = self._settings.eos_token_id
        end_tokens = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        sampler = Sampler.of(
            self.model,
            self._sampling(settings),
            prompt_tokens=len(tokens),
            seed=settings.seed,
            num_logprobs=settings.num_logprobs,
        )
        text = TextStream(tenant.tokenizer, settings.stops, settings.special)
        answer = Answer(self, tenant, text, self.limits.seconds, end_tokens)
        answer.name = self.batcher.add(
            tenant.delta,
            tokens,
            sampler,
            max_tokens=max_tokens,
            end_tokens=end_tokens,
            told=answer.told.put_nowait,
        )
        tenant.running += 1
        return answer

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        room = min(self.context or self.batcher.cache_tokens, self.batcher.cache_tokens)
        if prompt + (wanted or 1) > room:
            what = "context" if room == self.context else "cache"
            raise TooLongError(
                f"the model's {what} is {room} tokens: a prompt of {prompt} tokens and "
                f"{wanted or 1} new ones exceed it; shorten one of them"
            )
        return room - prompt if wanted is None else wanted

    def _sampling(self, settings: Settings) -> GenerationConfig:
        config = copy(self._settings)
        given = {k: v for k, v in settings.sampling.items() if v is not None}
        if (temperature := given.get("temperature")) is not None:
            config.do_sample = temperature > 0
            if temperature == 0:
                del given["temperature"]
        for name, value in given.items():
            setattr(config, name, value)
        return config


class Answer:
    """An answer that is being generated.

    Attributes:
        name: The batcher's.
        told: What it has told.
    """

    def __init__(
        self,
        engine: Engine,
        tenant: Tenant,
        text: TextStream,
        seconds: float,
        end_tokens: Sequence[int],
    ) -> None:
        self.name = ""
        self.told: asyncio.Queue[Progress] = asyncio.Queue()
        self._engine, self._tenant, self._text = engine, tenant, text
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._ends = set(end_tokens)
        self._done = False

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield the answer's parts; ended early, it is cancelled.

        Raises:
            TimeoutError: It took too long.
            WorkerDiedError: It was not finished.
        """
        seen = 0
        try:
            while not self._done:
                async with asyncio.timeout_at(self._deadline):
                    progress = await self.told.get()
                while not self.told.empty():
                    progress = self.told.get_nowait()
                if progress.error is not None:
                    raise WorkerDiedError(f"the answer could not be finished: {progress.error}")
                tokens, last = progress.tokens, progress.finished
                piece = self._text.add(tokens[seen:], last=last)
                reason = "stop" if self._text.stopped else None
                if last and reason is None:
                    reason = "stop" if tokens and tokens[-1] in self._ends else "length"
                chosen = progress.chosen[seen : len(tokens)]
                seen = len(tokens)
                if reason is not None:
                    self._end(cancel=not last)
                if piece or chosen or reason is not None:
                    yield Piece(piece, chosen, seen, reason, tokens if reason else None)
        finally:
            self._end(cancel=True)

    def cancel(self) -> None:
        """End it, if it has not ended."""
        self._end(cancel=True)

    def _end(self, *, cancel: bool) -> None:
        if not self._done:
            self._done = True
            self._tenant.running -= 1
            if cancel:
                self._engine.batcher.cancel(self.name)
