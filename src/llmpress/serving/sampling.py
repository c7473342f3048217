"""The next token of each request of a batch, by its own settings, and its log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True)
class Chosen:
    """A token and how probable it was, before temperature and all that comes after it.

    Attributes:
        token: Its number.
        logprob: Its natural logarithm.
        top: The most probable tokens and theirs, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Sampler:
    """How one request's tokens are chosen.

    Attributes:
        processors: What `generate` would change the logits with.
        samples: Whether tokens are drawn; else the most probable one is taken.
        generator: Of the draws; one with a seed draws what `generate` draws after
            ``torch.manual_seed``.
        num_logprobs: Most probable tokens to note of each; None for no log probabilities at all.
        chosen: What was noted so far.
    """

    processors: LogitsProcessorList
    samples: bool
    generator: torch.Generator
    num_logprobs: int | None = None
    chosen: list[Chosen] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        settings: GenerationConfig,
        *,
        prompt_tokens: int,
        seed: int | None = None,
        num_logprobs: int | None = None,
    ) -> "Sampler":
        """Return the sampler of `generate` with these settings."""
        generator = torch.Generator(model.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        made_by: Any = model
        processors = made_by._get_logits_processor(
            settings, input_ids_seq_length=prompt_tokens, device=str(model.device)
        )
        return cls(processors, bool(settings.do_sample), generator, num_logprobs)

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """Return the next token.

        Args:
            logits: fp32 ``[vocabulary]``.
            tokens: Those of the prompt and what was generated.
        """
        scores = logits[None]
        if self.processors:
            ids: Any = torch.tensor([tokens], device=logits.device)
            scores = self.processors(ids, scores.clone())
        if self.samples:
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
            token = int(drawn)
        else:
            token = int(scores.argmax())
        if self.num_logprobs is not None:
            logprobs = logits.log_softmax(-1)
            values, numbers = logprobs.topk(min(self.num_logprobs, len(logprobs)))
            top = tuple(zip(numbers.tolist(), values.tolist(), strict=True))
            self.chosen.append(Chosen(token, float(logprobs[token]), top))
        return token
