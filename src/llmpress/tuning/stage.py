"""Finetune a compressed model on disk block by block: what stage and benchmark share."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import check_calibration, load_windows
from llmpress.core.artifacts import artifact_folder, fingerprint
from llmpress.core.resume import SCRATCH, BlockStore
from llmpress.methods.base import Method, Tunable
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.tuning.blocks import tune_blocks
from llmpress.tuning.settings import TuningSettings
from llmpress.tuning.writing import rewrite_model


def tune_model(
    compressed: Path,
    model: Path,
    calibration: Path,
    out: Path,
    *,
    method: Tunable,
    settings: TuningSettings,
    record: Mapping[str, Any],
    seed: int,
    device: torch.device,
    scratch: Path = SCRATCH,
) -> None:
    """Finetune every decoder block of a compressed model against the original's.

    A killed call continues after its last finished block when it is repeated.

    Args:
        compressed: The artifact to finetune; stays as it is.
        model: Its original.
        calibration: A calibration artifact of the original: windows to train on and to judge by.
        out: The artifact to write.
        method: How it was compressed: which block outputs are compared, and how.
        settings: Optimiser settings.
        record: Names and settings for the provenance, beside these.
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the finished blocks of an unfinished call.

    Raises:
        ArtifactError: A damaged folder, or a calibration of another model.
        NumericalError: A loss or a hidden state is NaN or Inf.
    """
    inputs = {"compressed": compressed, "model": model, "calibration": calibration}
    method_settings = asdict(method) if isinstance(method, Method) else {}
    decided = {**record, **asdict(settings), "method_settings": method_settings, "seed": seed}
    fingerprints = {role: fingerprint(path) for role, path in inputs.items()}
    check_calibration(calibration, fingerprints["model"], model.name)
    store = BlockStore(f"finetune-{out.name}", {**decided, **fingerprints}, scratch)
    with (
        store,  # kept until the artifact is complete
        artifact_folder(
            out, stage="finetune", settings=decided, inputs=inputs, seconds=store.seconds
        ) as folder,
    ):
        student_checkpoint = Checkpoint(compressed)
        teacher, student = (
            BlockWalk(skeleton(c), c, device=device, autocast=settings.autocast)
            for c in (Checkpoint(model), student_checkpoint)
        )
        windows, validation = load_windows(calibration)
        blocks = tune_blocks(
            teacher, student, method, windows, validation, settings, seed=seed, store=store
        )
        rewrite_model(student_checkpoint, blocks, folder)
