"""Losses of a whole model, with the logits of a few positions in memory at a time.

Dimensions: ``B`` sequences of ``T`` tokens, ``P`` predicted positions, ``V`` the vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK = 512
"""Positions whose logits are in memory together: 100 MB in fp32 for 50,000 words."""


def model_loss(
    model: PreTrainedModel,
    tokens: Tensor,
    labels: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    chunk: int | None = CHUNK,
) -> Tensor:
    """Return the mean loss in nats over the positions that are predicted.

    Args:
        model: What trains.
        tokens: int64 ``[B, T]``, padded on the right.
        labels: The token itself where it is learnt, -100 elsewhere, ``[B, T]``.
        teacher: With it the loss is ``KL(teacher || model)``; without it the cross-entropy of the
            token that follows.
        chunk: Positions whose logits are in memory together; they are computed again for the
            gradient. None: all of them, which are kept for it.
    """
    learnt = labels[:, 1:] != -100  # [B, T - 1]
    states = _states(model, tokens, learnt)  # [P, hidden]
    targets = labels[:, 1:][learnt]  # [P]
    head, teacher_head = model.get_output_embeddings(), None
    aims = targets
    if teacher is not None:
        with torch.no_grad():
            aims = _states(teacher, tokens, learnt)
        teacher_head = teacher.get_output_embeddings()
    if chunk is None:
        return _chunk_loss(states, aims, head, teacher_head) / len(targets)
    total = torch.zeros((), device=states.device)
    for part, aim in zip(states.split(chunk), aims.split(chunk), strict=True):
        loss = checkpoint(_chunk_loss, part, aim, head, teacher_head, use_reentrant=False)
        total = total + loss
    return total / len(targets)


def _states(model: PreTrainedModel, tokens: Tensor, learnt: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    found: Tensor = hidden[:, :-1][learnt]
    return found


def _chunk_loss(states: Tensor, aim: Tensor, head: nn.Module, teacher: nn.Module | None) -> Tensor:
    """Return the sum over the positions of one chunk."""
    logits = head(states).float()  # [P, V]
    if teacher is None:
        return functional.cross_entropy(logits, aim, reduction="sum")
    with torch.no_grad():
        wanted = teacher(aim).float().log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
