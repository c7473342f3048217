"""Attention over a paged cache on a CPU, sequence by sequence.

What transformers has for continuous batching without flash attention multiplies every token of a
batch with the keys of all sequences and masks those of others: with 64 sequences 64 times as much
as is needed, and a mask as large as the cache. Here every sequence is computed as `generate`
computes it alone.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "llmpress_paged"


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Store keys and values of a packed batch and attend within each of its sequences.

    Args:
        module: The model's attention.
        query: ``[1, heads, tokens, head_dim]``, sequences one after the other.
        key: ``[1, key_heads, tokens, head_dim]`` of the same tokens.
        value: As ``key``.
        attention_mask: None.
        cache: Transformers' ``PagedAttentionCache``, which the keys and values go into.
        sliding_window: Tokens that a token sees at most, itself included.
        kwargs: Among others ``cu_seq_lens_q`` and, by kind of layer, ``cu_seq_lens_k``.

    Returns:
        ``[1, tokens, heads, head_dim]``.
    """
    del attention_mask
    starts = kwargs.pop("cu_seq_lens_q").tolist()
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    key_starts = kwargs.pop("cu_seq_lens_k").tolist()
    kwargs.pop("is_causal", None)
    parts = []
    for place, (first, end) in enumerate(pairwise(starts)):
        keys = slice(key_starts[place], key_starts[place + 1])
        mask = _mask(end - first, keys.stop - keys.start, sliding_window)
        part, _ = sdpa_attention_forward(
            module,
            query[:, :, first:end],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            is_causal=mask is None,
            **kwargs,
        )
        parts.append(part)
    return torch.cat(parts, dim=1), None


def _mask(queries: int, keys: int, window: int | None) -> Tensor | None:
    """Return which keys each query sees, ``[1, 1, queries, keys]``; None for all before it."""
    if queries == 1 or (queries == keys and (window is None or keys <= window)):
        return None
    place = torch.arange(keys - queries, keys)[:, None]
    seen = torch.arange(keys)[None]
    mask = seen <= place
    if window is not None:
        mask &= seen > place - window
    return mask[None, None]


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
