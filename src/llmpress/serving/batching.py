"""transformers' continuous batching, with a delta of its own for each request.

The manager knows no tenants. Of every batch it tells the logits processors which requests it is
made of, and has them change the scores of each: `_Tenants` is such a list of processors, tells the
bank whose the tokens are, and chooses the next token of every request by its own settings. The
cache of prefixes is told tokens that differ between tenants. docs/decisions/0017 says why so.
"""

import copy
import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from llmpress.core.errors import ConfigError, LLMPressError
from llmpress.serving.attention import NAME as PAGED_ATTENTION
from llmpress.serving.bank import DeltaBank
from llmpress.serving.rows import Name
from llmpress.serving.sampling import Chosen, Sampler

KNOWN_TRANSFORMERS = "5.23."
"""Whose cache asks for prefixes where tenants are kept apart; with another nothing is shared."""
PAGE = 32
"""Tokens of a page of the cache; prefixes are shared by whole pages."""
VOCABULARY = 2**20
"""More tokens than any model knows."""
MOST_TENANTS = 2**31 // VOCABULARY
"""The cache takes tokens as 32-bit integers."""


class WorkerDiedError(LLMPressError):
    """The thread that generates has ended with an error: nothing is answered any more."""


@dataclass(frozen=True)
class Progress:
    """What a request has generated so far.

    Attributes:
        tokens: All of them.
        chosen: Their log probabilities, where those were asked for.
        finished: Whether there will be no more.
        error: Why it failed.
    """

    tokens: list[int]
    chosen: list[Chosen]
    finished: bool
    error: str | None = None


@dataclass
class _Request:
    tenant: Name
    number: int
    sampler: Sampler


class _Tenants(ContinuousBatchingLogitsProcessorList):
    """What the manager calls with each batch: before it for its requests, after it for its scores.

    Args:
        bank: Is told whose the tokens are.
        requests: By their names.
        head_sees_all: Whether the model's head is applied to all tokens of a batch.
    """

    def __init__(
        self, bank: DeltaBank, requests: dict[str, _Request], *, head_sees_all: bool
    ) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._bank, self._requests, self._head_sees_all = bank, requests, head_sees_all
        self._states: list[Any] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Note the requests of the next batch; they need no tensors."""
        tokens: list[Name] = []
        heads: list[Name] = []
        for part in requests_in_batch:
            tenant = self._tenant(part.state.request_id)
            tokens += [tenant] * part.query_length
            if part.has_new_token:
                heads.append(tenant)
        self._states = [part.state for part in requests_in_batch if part.has_new_token]
        # The head gets a token for every request; those that have no new one get the first.
        heads += tokens[:1] * (len(requests_in_batch) - len(heads))
        self._bank.use_packed(tokens, tokens if self._head_sees_all else heads)
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Return scores ``[requests, vocabulary]`` that only the chosen tokens' are not 0 of."""
        del input_ids, logits_processor_args
        one_hot = torch.zeros_like(scores)
        for row, state in enumerate(self._states):
            request = self._requests.get(state.request_id)
            if request is not None:  # else it was cancelled
                tokens = state.initial_tokens + state.generated_tokens
                one_hot[row, request.sampler.choose(scores[row], tokens)] = 1
        return one_hot

    def _tenant(self, request_id: str) -> Name:
        found = self._requests.get(request_id)
        return None if found is None else found.tenant


class _Nowhere(queue.Queue[Any]):
    """Takes what was generated for those who no longer ask."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Forget the item."""
        del item, block, timeout


class Batcher:
    """Generates for many requests at once, each with the delta of its tenant.

    Args:
        bank: The model with its deltas. Nobody else uses them while requests run, but in `paused`.
        max_requests: Of a batch.
        cache_tokens: Tokens, of all requests together, whose keys and values there is room for.
        max_batch_tokens: Of a batch; longer prompts are computed in parts.

    Raises:
        ConfigError: The model is none that transformers' continuous batching can run.
    """

    def __init__(
        self, bank: DeltaBank, *, max_requests: int, cache_tokens: int, max_batch_tokens: int
    ) -> None:
        model: Any = bank.model
        self.model = model
        self._bank = bank
        self._requests: dict[str, _Request] = {}
        self._tenants: dict[Name, int] = {}
        self._names = map("request-{}".format, itertools.count())
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-cache_tokens // PAGE),
            max_batch_tokens=max(max_batch_tokens, max_requests),
            max_requests_per_batch=max_requests,
            max_memory_percent=1.0,
            allow_block_sharing=transformers.__version__.startswith(KNOWN_TRANSFORMERS),
            use_async_batching=False,  # the bank and the samplers need each batch's result
            use_cuda_graph=False,  # which would replay the deltas of another batch
        )
        kind = type(self.model).__name__
        try:
            self._manager = self.model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1), config
            )
            if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(PAGED_ATTENTION)
            keeps: Any = getattr(self.model, "_supports_logits_to_keep", bool)
            sees_all = not keeps()
            self._manager.logit_processor = _Tenants(bank, self._requests, head_sees_all=sees_all)
            self._manager.warmup()
        except MemoryError as error:
            raise ConfigError(f"a cache of {cache_tokens} tokens: {error}; ask for less") from None
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"{kind}: transformers' continuous batching cannot run it ({error})"
            ) from None
        self.cache = self._manager.batch_processor.cache
        self._manager.output_router.output_queue = _Nowhere()
        self._keep_tenants_apart()
        self.cache_tokens = int(self.cache.num_blocks) * PAGE

    def start(self) -> None:
        """Start the thread that generates."""
        self._manager.start()

    def stop(self, *, at_once: bool = False) -> None:
        """End the thread, after what runs or at once, and give the model back."""
        self._manager.stop(hard_stop=at_once)
        if self.model.config._attn_implementation == PAGED_ATTENTION:
            self.model.set_attn_implementation("sdpa")
        self._bank.use(None)

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return bool(self._manager.is_running()) and self._error() is None

    def is_idle(self) -> bool:
        """Whether no request is computed, waits, or holds a part of the cache."""
        return not self._requests and not self._manager.batch_processor.has_pending_requests()

    def free_cache(self) -> float:
        """Return the share of the cache that no request holds, 0 to 1."""
        allocators = self.cache.cache_allocators.values()
        kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in allocators)
        size = self.cache.num_sectors * self.cache.bytes_per_sector
        return float(self.cache.compute_free_capacity() + kept / size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no batch run, so that the bank's deltas may change; requests go on afterwards.

        Raises:
            WorkerDiedError: It has.
        """
        try:
            with self._manager.pause():
                yield
        except RuntimeError:
            if self.is_alive():
                raise
            raise self._died() from None

    def add(
        self,
        tenant: Name,
        tokens: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int,
        end_tokens: Sequence[int],
        told: Callable[[Progress], None],
    ) -> str:
        """Begin a request; `cancel` ends it early.

        Args:
            tenant: A name of the bank, None for the base.
            tokens: The prompt, at least one, all of them in the tenant's vocabulary.
            sampler: How to choose tokens.
            max_tokens: To generate at most.
            end_tokens: After any of which nothing comes.
            told: Called in the caller's event loop with what was generated, again and again.

        Returns:
            The request's name.

        Raises:
            WorkerDiedError: The thread has ended.
        """
        name = next(self._names)
        self._requests[name] = _Request(tenant, self._number(tenant), sampler)

        def report(output: Any) -> None:
            finished = output.is_finished()
            if finished:
                self._requests.pop(name, None)
            told(Progress(output.generated_tokens, sampler.chosen, finished, output.error))

        self._manager.register_result_handler(name, report)
        accepted = self._manager.add_request(
            list(tokens),
            request_id=name,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=list(end_tokens),
        )
        if accepted is None:
            self._forget(name)
            raise self._died()
        return name

    def cancel(self, name: str) -> None:
        """End a request; nothing more is told of it."""
        self._manager.cancel_request(name)
        self._forget(name)

    def forget(self, tenant: Name) -> None:
        """Share nothing of what was computed for a tenant; `paused`, and none of its requests run.

        The other tenants' prefixes that nobody uses are computed again too.
        """
        self.cache.evict_cached_blocks()
        self._tenants.pop(tenant, None)

    def _forget(self, name: str) -> None:
        self._requests.pop(name, None)
        self._manager.output_router.result_handlers.pop(name, None)

    def _number(self, tenant: Name) -> int:
        if tenant not in self._tenants:
            free = set(range(MOST_TENANTS)).difference(self._tenants.values())
            if not free:
                raise ConfigError(f"{tenant}: {MOST_TENANTS} tenants are served already")
            self._tenants[tenant] = min(free)
        return self._tenants[tenant]

    def _keep_tenants_apart(self) -> None:
        """Let the cache find prefixes of a tenant alone.

        It finds them by hashes of their tokens, each page's with that of the page before it: the
        first token is one of the tenant's own there.
        """
        search, mark = self.cache.search_prefix_match, self.cache.mark_complete_blocks

        def own(request_id: str, tokens: list[int]) -> list[int] | None:
            request = self._requests.get(request_id)
            if request is None:  # it was cancelled
                return None
            return [request.number * VOCABULARY + tokens[0], *tokens[1:]]

        def searched(request_id: str, tokens: list[int]) -> int:
            return int(search(request_id, found)) if (found := own(request_id, tokens)) else 0

        def marked(state: Any, blocks: dict[str, int]) -> None:
            if found := own(state.request_id, state.initial_tokens):
                state = copy.copy(state)
                state.initial_tokens = found
                mark(state, blocks)

        self.cache.search_prefix_match = searched
        self.cache.mark_complete_blocks = marked

    def _error(self) -> Exception | None:
        error: Exception | None = self._manager.background_thread_status.fatal_error
        return error

    def _died(self) -> WorkerDiedError:
        reason = self._error() or "it is stopping"
        return WorkerDiedError(f"the worker has ended ({reason}): start the server again")
