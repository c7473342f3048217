"""Calibrate a model on disk with some text: what stage and command share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmpress.calibration.files import save_calibration
from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.artifacts import artifact_folder
from llmpress.core.errors import SourceError
from llmpress.data.corpora import load_text, token_windows
from llmpress.data.tasks.files import TRAIN_FILE, read_items
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.loading import load_tokenizer, skeleton
from llmpress.models.walk import BlockWalk

HELD_OUT = 0.2
"""Share of a text without parts of its own, at its end, that calibration keeps aside."""


@dataclass(frozen=True)
class CalibrationText:
    """Documents of one corpus.

    Attributes:
        statistics: What statistics are taken over and finetuning trains on.
        validation: What finetuning is judged by; shares no document with the other.
    """

    statistics: Sequence[str]
    validation: Sequence[str]


def corpus_text(folder: Path) -> CalibrationText:
    """Read the two parts of a corpus that calibration may see, never its test text."""
    return CalibrationText(load_text(folder, "calibration"), load_text(folder, "validation"))


def task_text(folder: Path) -> CalibrationText:
    """Read the training items of a task as text: what a fine-tuned model was made for.

    Raises:
        ArtifactError: No training items there.
        SourceError: Items of another form.
    """
    items = read_items(folder / TRAIN_FILE)
    try:
        documents = [item["query"] + item["target"] for item in items]
    except (KeyError, TypeError):
        raise SourceError(
            f"{folder}: its items hold no `query` and `target`: use a generated task"
        ) from None
    cut = int(len(documents) * (1 - HELD_OUT))
    return CalibrationText(documents[:cut], documents[cut:])


def calibrate_model(
    model: Path,
    texts: Mapping[str, CalibrationText],
    settings: CalibrationSettings,
    out: Path,
    *,
    inputs: Mapping[str, Path],
    seed: int,
    device: torch.device,
    delta: Path | None = None,
) -> None:
    """Write token windows and the second moments of all linears' inputs.

    Args:
        model: A Hugging Face folder of safetensors.
        texts: Text by corpus; each gives the same number of windows.
        settings: How many windows of which length.
        out: The calibration artifact to write.
        inputs: Artifacts the texts were read from, by role, for the provenance.
        seed: Of the labels that sensitivities are measured with; same seed, same bytes.
        device: Where to compute.
        delta: An extracted delta: then it is the fine-tuned model that is calibrated, ``model``
            with this delta.

    Raises:
        SourceError: A text is too short.
        ArtifactError: The folder holds no model, or a damaged one.
    """
    recorded = {**asdict(settings), "seed": seed}
    if not settings.tasks:
        del recorded["tasks"]
    made_from = {"model": model} if delta is None else {"base": model, "delta": delta}
    roles = {**made_from, **inputs}
    with artifact_folder(out, stage="calibrate", settings=recorded, inputs=roles) as folder:
        tokenizer = load_tokenizer(model)
        windows, validation = (
            torch.cat([token_windows(text, tokenizer, settings.length, count) for text in parts])
            for parts, count in (
                ([text.statistics for text in texts.values()], settings.windows),
                ([text.validation for text in texts.values()], settings.validation_windows),
            )
        )
        checkpoint = Checkpoint(model)
        if delta is not None:
            opened = DeltaFolder(delta, "delta")
            checkpoint = FinetunedCheckpoint(dense_checkpoint(model), opened)
        walk = BlockWalk(
            skeleton(checkpoint), checkpoint, device=device, autocast=settings.autocast
        )
        per_corpus = windows.view(len(texts), settings.windows, -1)
        felt = per_corpus[:, : settings.sensitivity_windows].reshape(-1, settings.length)
        save_calibration(walk, windows, validation, folder, felt, seed)
