"""lm-eval's view of a model in memory, which reads each question once for all of its answers.

C: questions (contexts) of a batch; B: their answers; T: tokens of the longest of them; V: size of
the vocabulary. A multiple-choice item asks for the probability of several answers after the same
context. The context goes through the model once; the answers share what attention keeps of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and answer as text, the tokens of both."""

BATCH_TOKENS = {"cpu": 256, "cuda": 8192}  # padded tokens of the answers scored at the same time
GENERATION_BATCH = 64  # texts generated at the same time


class SharedContextLM(HFLM):  # type: ignore[misc]
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
        if not self._can_share(requests):
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return answers
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="score answers", disable=disable_tqdm) as bar:
            for batch in batched(requests, BATCH_TOKENS[self.device.type]):
                scores = self._score([requests[i] for i in batch])
                found.update(zip(batch, scores, strict=True))
                bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _can_share(self, requests: Sequence[Request]) -> bool:
        """Whether every context has a part to share, fits, and the model keeps all of it."""
        lengths = [len(context) for _, context, _ in requests]
        totals = [len(context) + len(answer) for _, context, answer in requests]
        if not requests or min(lengths) < 2 or max(totals) > self.max_length + 1:
            return False
        with torch.inference_mode():
            tokens = torch.tensor([requests[0][1][:1]], device=self.device)
            cache = getattr(self.model(input_ids=tokens, use_cache=True), "past_key_values", None)
        return isinstance(cache, DynamicCache) and not any(cache.is_sliding)

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Score answers; the last token of a context, which predicts the answer, goes with them."""
        contexts = list(dict.fromkeys(tuple(context) for _, context, _ in requests))
        owner = torch.tensor([contexts.index(tuple(context)) for _, context, _ in requests])
        prefix, prefix_mask = padded([context[:-1] for context in contexts])  # [C, T]
        rows, mask = padded(
            [(context + answer[:-1])[len(context) - 1 :] for _, context, answer in requests]
        )
        device = self.device
        cache = self.model(
            input_ids=prefix.to(device),
            attention_mask=prefix_mask.to(device),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_select_indices(owner.to(device))
        starts = prefix_mask.sum(dim=1)[owner]  # [B]
        logits: Tensor = self.model(
            input_ids=rows.to(device),
            attention_mask=torch.cat([prefix_mask[owner], mask], dim=1).to(device),
            position_ids=(starts[:, None] + torch.arange(rows.shape[1])).to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits  # [B, T, V]
        answers = []
        for row, (_, _, answer) in zip(logits, requests, strict=True):
            log_p = torch.log_softmax(row[: len(answer)].float(), dim=-1)
            tokens = torch.tensor(answer, device=device)
            greedy = bool((log_p.argmax(dim=-1) == tokens).all())
            answers.append((float(log_p.gather(-1, tokens[:, None]).sum()), greedy))
        return answers


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of tokens padded at the right, and 1 for each token, both int64 ``[rows, T]``."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, mask


def batched(requests: Sequence[Any], max_tokens: int) -> list[list[int]]:
    """Group requests so that those with the same context stay together.

    Args:
        requests: What is scored.
        max_tokens: Bound on the padded tokens of a batch's answers; the answers of one context stay
            together even where they exceed it.

    Returns:
        Indices of requests by batch, batches with long answers first.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(index)
    longest = {key: max(len(requests[i][2]) for i in group) for key, group in groups.items()}
    order = sorted(groups, key=lambda key: (longest[key], len(key)), reverse=True)
    batches: list[list[int]] = []
    width = 0
    for key in order:
        if batches and (len(batches[-1]) + len(groups[key])) * width <= max_tokens:
            batches[-1] += groups[key]
        else:
            width = longest[key]
            batches.append(list(groups[key]))
    return batches
