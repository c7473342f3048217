"""How fast a model generates as it is stored, against its original, with batch size 1."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmpress.core.artifacts import verify
from llmpress.core.devices import pick_device, pick_dtype
from llmpress.core.environment import hardware
from llmpress.evaluation.metrics import Speed, SpeedOfRun
from llmpress.evaluation.reference import FILE
from llmpress.evaluation.settings import SpeedSettings
from llmpress.evaluation.subjects import Subject
from llmpress.models.loading import load_model

MIN_STEPS = 2
MAX_SECONDS = 2.0  # packed layers can take seconds per token on a CPU


@dataclass(frozen=True)
class Timing:
    """Of one text.

    Attributes:
        prefill_seconds: Until the first new token.
        decode_seconds: Median of a further token.
    """

    prefill_seconds: float
    decode_seconds: float


def measure_speed(
    subjects: Sequence[Subject],
    settings: SpeedSettings,
    references: Path,
    device: str | torch.device | None = None,
) -> Speed:
    """Time runs as they are stored, each in turns with its original.

    What else the machine does then slows both.

    Args:
        subjects: What is timed; compressed layers stay packed.
        settings: How.
        references: Folder of the originals' references, whose first window begins the prompt.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.

    Raises:
        ArtifactError: A model or a reference is missing or damaged.
    """
    place, dtype, runs = str(pick_device(device)), pick_dtype(settings.dtype), {}
    for subject in tqdm(subjects, desc="speed", unit="run"):
        prompt = _prompt(references / subject.original, settings.prefill_tokens)
        models = (
            subject.load(dtype, place),
            load_model(subject.original_folder, dtype=dtype, device=place),
        )
        own, original = in_turns(models, prompt, settings.decode_tokens, settings.rounds)
        runs[subject.name] = SpeedOfRun(
            original=subject.original,
            prefill_tokens_per_second=len(prompt) / median(t.prefill_seconds for t in own),
            decode_tokens_per_second=1 / median(t.decode_seconds for t in own),
            prefill_ratios=[
                b.prefill_seconds / a.prefill_seconds for a, b in zip(own, original, strict=True)
            ],
            decode_ratios=[
                b.decode_seconds / a.decode_seconds for a, b in zip(own, original, strict=True)
            ],
        )
    return Speed(
        runs=runs,
        prefill_tokens=settings.prefill_tokens,
        decode_tokens=settings.decode_tokens,
        dtype=settings.dtype,
        device=place,
        num_threads=torch.get_num_threads(),
        hardware=hardware(),
    )


def in_turns(
    models: Sequence[PreTrainedModel], prompt: Tensor, decode_tokens: int, rounds: int
) -> list[list[Timing]]:
    """Time models one after the other, again and again; what only a first call does is left out.

    Args:
        models: What is timed.
        prompt: Token ids, int64 ``[tokens]``.
        decode_tokens: Tokens to generate after the first one; two where they are slow.
        rounds: How often each is timed.

    Returns:
        By model, a timing for each round.
    """
    timings: list[list[Timing]] = [[] for _ in models]
    for index in range(rounds + 1):
        for model, found in zip(models, timings, strict=True):
            timing = time_generation(model, prompt, decode_tokens)
            if index:
                found.append(timing)
    return timings


@torch.inference_mode()
def time_generation(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> Timing:
    """Time one prompt and the tokens generated after it.

    Args:
        model: As it is stored.
        prompt: Token ids, int64 ``[tokens]``.
        decode_tokens: Tokens to generate after the first one, at least 2; no more than that once
            ``MAX_SECONDS`` are over.

    Raises:
        ValueError: Too few tokens to measure.
    """
    if decode_tokens < MIN_STEPS or len(prompt) < 1:
        raise ValueError(f"{decode_tokens} tokens after {len(prompt)} are too few to measure speed")
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
    start, first, *further = clock.times
    return Timing(first - start, median(b - a for a, b in pairwise([first, *further])))


class _Clock(StoppingCriteria):
    """Notes when each token was there; ends generation when that has taken long enough."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times = [self.now()]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        del scores
        self.times.append(self.now())
        enough = len(self.times) >= MIN_STEPS + 2 and self.times[-1] - self.times[0] > MAX_SECONDS
        return torch.full((len(input_ids),), enough, device=input_ids.device)

    def now(self) -> float:
        """Return the time when all work queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _prompt(reference: Path, tokens: int) -> Tensor:
    verify(reference)
    kept = load_file(reference / FILE)
    windows = kept[min(name for name in kept if name.startswith("windows."))]
    return windows.flatten()[:tokens].long()
