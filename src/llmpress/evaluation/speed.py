"""How fast a model generates with batch size 1, and how much memory that takes."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmpress.core.environment import peak_memory_bytes

MIN_STEPS = 2
MAX_SECONDS = 2.0  # packed layers can take seconds per token on a CPU


@dataclass(frozen=True)
class Speed:
    """Batch size 1, greedy.

    Attributes:
        prefill_tokens_per_second: Tokens of the prompt over the time until the first new token.
        decode_tokens_per_second: One over the median time of a further token.
        peak_memory_bytes: Largest resident memory of the process so far, plus the largest
            allocation on the GPU.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int


class _Clock(StoppingCriteria):
    """Notes when each token was there; ends generation when that has taken long enough."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times = [self.now()]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        del scores
        self.times.append(self.now())
        enough = len(self.times) >= MIN_STEPS + 2 and self.elapsed > MAX_SECONDS
        return torch.full((len(input_ids),), enough, device=input_ids.device)

    @property
    def elapsed(self) -> float:
        """Seconds between the beginning and the last token."""
        return self.times[-1] - self.times[0]

    def now(self) -> float:
        """Return the time when all work queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.inference_mode()
def measure_speed(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> Speed:
    """Time one prompt and the tokens generated after it.

    Measured twice, the second time counts, unless the first one already took longer than
    ``MAX_SECONDS``: what only a first call has to do hardly matters then. A measurement that takes
    longer ends after two further tokens.

    Args:
        model: As it is stored: compressed layers stay packed.
        prompt: Token ids, int64 ``[tokens]``.
        decode_tokens: Tokens to generate after the first one, at least 2.

    Returns:
        Speeds and peak memory.

    Raises:
        ValueError: Too few tokens to measure.
    """
    if decode_tokens < MIN_STEPS or len(prompt) < 1:
        raise ValueError(f"{decode_tokens} tokens after {len(prompt)} are too few to measure speed")
    clock = _generate(model, prompt, decode_tokens)
    if clock.elapsed <= MAX_SECONDS:
        clock = _generate(model, prompt, decode_tokens)
    start, first, *further = clock.times
    steps = [after - before for before, after in pairwise([first, *further])]
    return Speed(
        prefill_tokens_per_second=len(prompt) / (first - start),
        decode_tokens_per_second=1 / median(steps),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _generate(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> _Clock:
    """Generate up to ``decode_tokens`` tokens after the first and return when each was there."""
    batch = prompt[None].to(model.device)
    clock = _Clock(model.device)
    model.generate(  # type: ignore[operator]
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=decode_tokens + 1,
        min_new_tokens=decode_tokens + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock
