"""lm-eval's view of a model in memory, scoring only the positions that count.

B: sequences of a batch; T: its longest sequence; V: size of the vocabulary. Most of a
multiple-choice request is its question, for which lm-eval's own class computes V logits per token
that nobody reads: with a small model and a large vocabulary they cost a third of the time.
"""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text, the tokens of both."""

BATCH_TOKENS = 2048  # padded tokens of a batch of requests
GENERATION_BATCH = 64  # texts generated at the same time


class BatchedLM(HFLM):  # type: ignore[misc]
    """An lm-eval language model around a causal model.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=GENERATION_BATCH,
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return each answer's log-probability in nats, and whether it is the greedy one."""
        del override_bs
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="score answers", disable=disable_tqdm) as bar:
            for batch in batched(requests, BATCH_TOKENS):
                scores = self._score([requests[i] for i in batch])
                for index, answer in zip(batch, scores, strict=True):
                    answers[index] = answer
                bar.update(len(batch))
        return answers

    @torch.inference_mode()
    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        limit = self.max_length + 1
        rows = [(context + answer)[-limit:][:-1] for _, context, answer in requests]
        width = max(len(row) for row in rows)
        firsts = [len(row) - len(request[2]) for row, request in zip(rows, requests, strict=True)]
        if min(firsts) < 0:
            raise ValueError(f"an answer is longer than the model's context of {limit - 1} tokens")
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # [B, T]
        kept = width - min(firsts)
        logits = self._last_logits(padded.to(self.device), kept)  # [B, kept, V]
        answers = []
        for row, first, (_, _, answer) in zip(logits, firsts, requests, strict=True):
            start = first - min(firsts)
            log_p = torch.log_softmax(row[start : start + len(answer)].float(), dim=-1)
            tokens = torch.tensor(answer, device=log_p.device)
            greedy = bool((log_p.argmax(dim=-1) == tokens).all())
            answers.append((float(log_p.gather(-1, tokens[:, None]).sum()), greedy))
        return answers

    def _last_logits(self, tokens: Tensor, count: int) -> Tensor:
        """Return the logits of the last ``count`` positions, ``[B, count, V]``."""
        output: Any = self.model(input_ids=tokens, use_cache=False, logits_to_keep=count)
        return output.logits[:, -count:]  # type: ignore[no-any-return]


def batched(requests: list[Request], max_tokens: int) -> list[list[int]]:
    """Group requests of similar length, long ones first.

    Args:
        requests: What is scored.
        max_tokens: Bound on requests times longest request of a batch; a longer one stands alone.

    Returns:
        Indices of requests by batch.
    """
    lengths = [len(context) + len(answer) for _, context, answer in requests]
    batches: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
