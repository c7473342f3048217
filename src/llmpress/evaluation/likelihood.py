"""Perplexity of a model on text, and how far its predictions are from those of the original.

W: windows; T: tokens of a window; D: width of the hidden states; V: size of the vocabulary. Each
window is scored on its own: its tokens 2 to T are predicted from those before them in the window,
nothing is carried over to the next.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llmpress.core.errors import ArtifactError, NumericalError

CHUNK = 32  # positions whose distributions are computed at once, in fp32: 6 MB for 50,000 tokens


Predictions = Callable[[int, slice], Tensor]
"""Of a window's index and some of its T - 1 predictions, the logits ``[N, V]``."""


@dataclass(frozen=True)
class Likelihood:
    """Result over all windows of one text.

    Attributes:
        losses: Sums of the negative log-likelihood in nats by window, fp64 ``[W]``.
        divergences: Sums of ``KL(original || model)`` in nats by window, fp64 ``[W]``.
        agreements: Predictions by window whose most probable token is the original's, ``[W]``.
        window_tokens: Predictions of each window.
    """

    losses: Tensor
    divergences: Tensor
    agreements: Tensor
    window_tokens: int

    @property
    def num_tokens(self) -> int:
        """Predictions scored."""
        return self.window_tokens * len(self.losses)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood per token."""
        return math.exp(float(self.losses.sum()) / self.num_tokens)

    @property
    def kl_divergence_nats(self) -> float:
        """Mean over predictions of ``KL(original || model)``, natural logarithm."""
        return float(self.divergences.sum()) / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of predictions whose most probable token is the original's."""
        return float(self.agreements.sum()) / self.num_tokens

    def by_window(self) -> dict[str, list[float]]:
        """Return the means over the predictions of each window."""
        sums = {
            "loss_nats": self.losses,
            "kl_divergence_nats": self.divergences,
            "top1_agreement": self.agreements,
        }
        return {name: (values / self.window_tokens).tolist() for name, values in sums.items()}


def own_likelihood(losses: Tensor, window_tokens: int) -> Likelihood:
    """Return that of an original: it diverges by 0 from itself, and agrees with itself."""
    return Likelihood(
        losses, torch.zeros_like(losses), torch.full_like(losses, window_tokens), window_tokens
    )


@torch.inference_mode()
def last_states(model: PreTrainedModel, windows: Tensor, name: str) -> Tensor:
    """Return what a model's head predicts from, ``[W, T - 1, D]``, on the CPU."""
    body: Any = model.base_model
    rows = tqdm(windows, desc=f"reading {name}", unit="window")
    outputs = (body(input_ids=row[None].to(model.device), use_cache=False) for row in rows)
    return torch.cat([output.last_hidden_state[:, :-1].cpu() for output in outputs])


@torch.inference_mode()
def predictions(model: PreTrainedModel, states: Tensor) -> Predictions:
    """Return the predictions that follow from `last_states`.

    Only what the model does to them is computed: a linear layer, whose result some families scale
    or cap.
    """
    body: Any = model.base_model
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    output = body(input_ids=token, use_cache=False)  # a form to fill in

    def predict(index: int, part: slice) -> Tensor:
        output.last_hidden_state = states[index, part][None].to(model.device)
        tokens = token.expand(output.last_hidden_state.shape[:2])
        body.forward = lambda *_, **__: output
        try:
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            del body.forward
        return logits[0]

    return predict


@torch.inference_mode()
def likelihood(
    predict: Predictions, original: Predictions | None, windows: Tensor, name: str
) -> Likelihood:
    """Score predictions of token windows.

    Args:
        predict: Of the model that is evaluated.
        original: Of what it is compared with; None for the original itself, whose divergence
            is 0 and whose agreement is 1 by definition.
        windows: Token ids, int64 ``[W, T]``.
        name: Of the text, for the progress bar.

    Returns:
        Sums by window, accumulated in fp64.

    Raises:
        ArtifactError: The two have vocabularies of different sizes.
        NumericalError: A model computes NaN or Inf.
        ValueError: Windows without a token to predict.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: shape [>=1, >=2] is needed, not {list(windows.shape)}")
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)
    for index, window in enumerate(tqdm(windows, desc=f"likelihood on {name}", unit="window")):
        for start in range(1, len(window), CHUNK):
            targets = window[start : start + CHUNK]
            part = slice(start - 1, start - 1 + len(targets))
            logits = predict(index, part)
            reference = None if original is None else original(index, part)
            if reference is not None and reference.shape != logits.shape:
                raise ArtifactError(
                    f"a vocabulary of {logits.shape[1]} tokens compared with one of "
                    f"{reference.shape[1]}: the model was not made from this original"
                )
            sums[index] += score(logits, reference, targets.to(logits.device))
    if not bool(torch.isfinite(sums).all()):
        raise NumericalError(f"likelihood on {name}: the model computes NaN or Inf")
    losses, divergences, agreements = (column.clone() for column in sums.unbind(1))
    found = Likelihood(losses, divergences, agreements, windows.shape[1] - 1)
    loss = float(found.losses.sum()) / found.num_tokens
    if loss > math.log(torch.finfo(torch.float64).max):
        raise NumericalError(f"likelihood on {name}: a loss of {loss:.3g} nats has no perplexity")
    return found


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
    agreement = (log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum()
    p = log_p.exp()
    gaps = log_p.sub_(log_q)  # in place: fresh memory costs more than what is done with it
    gaps.masked_fill_(p == 0, 0.0)  # a token the original excludes adds nothing
    divergence = torch.linalg.vecdot(p, gaps).sum(dtype=torch.float64)
    return torch.tensor([loss.item(), divergence.item(), agreement.item()], dtype=torch.float64)
