"""Perplexity of a model on text, and how far its predictions are from those of the original.

T: tokens of a window; V: size of the vocabulary. Each window is scored on its own: its tokens 2 to
T are predicted from those before them in the window, nothing is carried over to the next.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llmpress.core.errors import ArtifactError, NumericalError

CHUNK = 128  # positions whose distributions are in memory at once, in fp32


@dataclass(frozen=True)
class Likelihood:
    """Result over all windows of one corpus.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood per token.
        kl_divergence_nats: Mean over predictions of ``KL(original || model)``, natural logarithm.
        top1_agreement: Share of predictions whose most probable token is the original's.
        num_tokens: Predictions scored.
    """

    perplexity: float
    kl_divergence_nats: float
    top1_agreement: float
    num_tokens: int


@torch.inference_mode()
def likelihood(
    model: PreTrainedModel, original: PreTrainedModel | None, windows: Tensor, name: str
) -> Likelihood:
    """Score a model on token windows, in one pass of it and one of the original.

    Args:
        model: What is evaluated.
        original: What it is compared with; None when ``model`` is itself the original, whose
            divergence is 0 and whose agreement is 1 by definition.
        windows: Token ids, int64 ``[windows, T]``.
        name: Of the corpus, for the progress bar.

    Returns:
        Means over all predictions, accumulated in fp64.

    Raises:
        ArtifactError: The two models have vocabularies of different sizes.
        NumericalError: A model computes NaN or Inf.
        ValueError: Windows without a token to predict.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: shape [>=1, >=2] is needed, not {list(windows.shape)}")
    totals = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, divergence, agreement
    for window in tqdm(windows, desc=f"likelihood on {name}", unit="window"):
        tokens = window[None].to(model.device)
        logits = _predictions(model, tokens)  # [T - 1, V]
        reference = None if original is None else _predictions(original, tokens)
        if reference is not None and reference.shape != logits.shape:
            raise ArtifactError(
                f"a vocabulary of {logits.shape[1]} tokens compared with one of "
                f"{reference.shape[1]}: the model was not made from this original"
            )
        targets = tokens[0, 1:]
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            totals += score(
                logits[part], None if reference is None else reference[part], targets[part]
            )
    if not bool(torch.isfinite(totals).all()):
        raise NumericalError(f"likelihood on {name}: the model computes NaN or Inf")
    num_tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, divergence, agreement = (totals / num_tokens).tolist()
    if loss > math.log(torch.finfo(torch.float64).max):
        raise NumericalError(f"likelihood on {name}: a loss of {loss:.3g} nats has no perplexity")
    return Likelihood(math.exp(loss), divergence, agreement, num_tokens)


def score(logits: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
    """Sum what is measured over some predictions.

    Args:
        logits: The model's, ``[N, V]``, any float dtype; computed with in fp32.
        reference: The original's, ``[N, V]``, or None for no divergence and full agreement.
        targets: The tokens that follow, int64 ``[N]``.

    Returns:
        fp64 ``[3]`` on the CPU: sums of the negative log-likelihood (nats), of
        ``KL(original || model)`` (nats), and of agreements of the most probable token.
    """
    log_q = torch.log_softmax(logits.float(), dim=-1)  # [N, V]
    loss = -log_q.gather(-1, targets[:, None]).sum(dtype=torch.float64)
    if reference is None:
        return torch.tensor([loss.item(), 0.0, float(len(targets))], dtype=torch.float64)
    log_p = torch.log_softmax(reference.float(), dim=-1)  # [N, V]
    p = log_p.exp()
    terms = torch.where(
        p > 0, p * (log_p - log_q), 0.0
    )  # a token the original excludes adds nothing
    divergence = terms.sum(dim=-1).sum(dtype=torch.float64)
    agreement = (log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum()
    return torch.tensor([loss.item(), divergence.item(), agreement.item()], dtype=torch.float64)


def _predictions(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits ``[T - 1, V]`` that predict the second to the last of ``tokens [1, T]``."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0, :-1]
