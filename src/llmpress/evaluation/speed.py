"""How fast a model generates with batch size 1, and how much memory that takes."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmpress.artifacts import peak_memory_bytes

WARM_UP_TOKENS = 8


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
    """Notes the time after each generated token and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        del scores
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def measure_speed(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> Speed:
    """Time one prompt and the tokens generated after it.

    Args:
        model: As it is stored: compressed layers stay packed.
        prompt: Token ids, int64 ``[tokens]``.
        decode_tokens: Tokens to generate after the first one.

    Returns:
        Speeds and peak memory.
    """
    prompt = prompt[None].to(model.device)
    _generate(model, prompt[:, :WARM_UP_TOKENS], 1)
    start, times = _generate(model, prompt, decode_tokens + 1)
    steps = [after - before for before, after in pairwise(times)]
    return Speed(
        prefill_tokens_per_second=prompt.shape[1] / (times[0] - start),
        decode_tokens_per_second=1 / median(steps),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _generate(model: PreTrainedModel, prompt: Tensor, count: int) -> tuple[float, list[float]]:
    """Generate exactly ``count`` tokens; return when it began and when each of them was there."""
    clock = _Clock()
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return start, clock.times
