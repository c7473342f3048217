"""Two models on the same text: what one of them lost against the other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmpress.core.devices import pick_device
from llmpress.data.corpora import Text
from llmpress.deltas.applying import load_delta
from llmpress.evaluation.likelihood import Likelihood
from llmpress.evaluation.metrics import Size
from llmpress.evaluation.reference import run_original
from llmpress.evaluation.sizes import compressed_size, delta_size, model_size
from llmpress.evaluation.uncertainty import paired_difference, standard_error
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.folders import model_folder
from llmpress.models.loading import dequantized, load_model


@dataclass(frozen=True)
class TextComparison:
    """Result on one text.

    Attributes:
        original_perplexity: Of the model compared with.
        other_perplexity: Of the other one.
        loss_difference_nats: Mean loss of the other one per prediction, less the original's.
        loss_difference_stderr_nats: Its standard error over windows, in pairs; None for one window.
        kl_divergence_nats: Mean ``KL(original || other)`` per prediction.
        kl_divergence_stderr_nats: Its standard error over windows; None for one window.
        top1_agreement: Share of predictions with the same most probable token.
        top1_agreement_stderr: Its standard error over windows; None for one window.
        num_tokens: Predictions scored.
    """

    original_perplexity: float
    other_perplexity: float
    loss_difference_nats: float
    loss_difference_stderr_nats: float | None
    kl_divergence_nats: float
    kl_divergence_stderr_nats: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    num_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Result of `compare_models`.

    Attributes:
        original_size: True size of the model compared with.
        other_size: True size of the other one; of the delta alone where there is one.
        texts: Results by text.
    """

    original_size: Size
    other_size: Size
    texts: Mapping[str, TextComparison]


def compare_models(
    original: Path | str,
    other: Path | str,
    *,
    text: Text,
    delta: Path | str | None = None,
    windows: int = 8,
    length: int = 512,
    device: str | torch.device | None = None,
) -> Comparison:
    """Compare two models in fp32, the compressed one by the dense weights it stands for.

    Args:
        original: Folder of the model compared with; its tokenizer is used.
        other: Folder of the other one, or of the base of ``delta``.
        text: What both read; see `measured_texts`.
        delta: A compressed delta to put on ``other``.
        windows: Windows of each text.
        length: Tokens of a window.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.

    Raises:
        ConfigError: No text, or no such device.
        ArtifactError: A damaged folder, or models of different vocabularies.
        SourceError: A text is too short.
    """
    place = str(pick_device(device))
    original, other = model_folder(original), model_folder(other)
    reference = run_original(original, text=text, windows=windows, length=length, device=place)
    model = load_model(other, device=place)
    if delta is not None:
        model = load_delta(model, delta)
    results = {
        name: _compare(reference.likelihoods[name], ours)
        for name, ours in reference.compare(dequantized(model)).items()
    }
    size = delta_size(Path(delta)) if delta is not None else folder_size(other)
    return Comparison(folder_size(original), size, results)


def _compare(original: Likelihood, other: Likelihood) -> TextComparison:
    means = other.by_window()
    loss = paired_difference(original.by_window()["loss_nats"], means["loss_nats"])
    return TextComparison(
        original_perplexity=original.perplexity,
        other_perplexity=other.perplexity,
        loss_difference_nats=loss.mean,
        loss_difference_stderr_nats=_known(loss.stderr),
        kl_divergence_nats=other.kl_divergence_nats,
        kl_divergence_stderr_nats=_known(standard_error(means["kl_divergence_nats"])),
        top1_agreement=other.top1_agreement,
        top1_agreement_stderr=_known(standard_error(means["top1_agreement"])),
        num_tokens=other.num_tokens,
    )


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def folder_size(folder: Path) -> Size:
    """Return the true size of a model folder, compressed or not."""
    return compressed_size(folder) if layer_records(folder) else model_size(folder)
