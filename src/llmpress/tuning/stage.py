"""Finetune a compressed model on disk block by block: what stage and Python share."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import check_calibration, load_windows
from llmpress.calibration.stage import calibrated_artifact
from llmpress.core.artifacts import (
    PROVENANCE,
    fingerprint,
    read_provenance,
)
from llmpress.core.devices import pick_device
from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.data.corpora import Text
from llmpress.methods.base import Method, Tunable
from llmpress.methods.registry import build_method, known_methods, method_class, method_name
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.folders import model_folder
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.tuning.blocks import tune_blocks
from llmpress.tuning.settings import TuningSettings
from llmpress.tuning.writing import rewrite_model


def finetune_model(
    compressed: Path | str,
    *,
    original: Path | str,
    out: Path | str,
    epochs: int,
    learning_rate: float,
    text: Text | None = None,
    calibration: Path | str | None = None,
    method: Method | None = None,
    windows: int = 16,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device | None = None,
    scratch: Path | str | None = None,
    force: bool = False,
    **settings: Any,
) -> Path:
    """Finetune a compressed model block by block against the original's decoder blocks.

    A killed call continues after its last finished block when it is repeated.

    Args:
        compressed: What `llmpress.compress_model` wrote, by cluscomp or lillama.
        original: The model it was made from.
        out: Folder to write: the compressed model with trained codebooks or factors.
        epochs: Passes over the calibration windows.
        learning_rate: Peak rate, relative to each tensor's root mean square.
        text: What to train on and to judge by; see `read_texts`.
        calibration: What `calibrate_model` wrote for the original, instead of ``text``.
        method: How it was compressed, which says what of two blocks is compared; by default what
            ``compressed`` says of itself.
        windows: Token windows of each text.
        length: Tokens of a window.
        seed: Same seed, same bytes.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        scratch: Folder for the finished blocks of an unfinished call; by default beside ``out``.
        force: Replace ``out`` where it exists.
        **settings: The others of `TuningSettings`.

    Returns:
        ``out``.

    Raises:
        ConfigError: An unknown setting, a method that has nothing to train, no text and no
            calibration, or both.
        ArtifactError: A damaged folder, a calibration of another model, or ``out`` exists.
        NumericalError: A loss or a hidden state is NaN or Inf.
    """
    given = {"epochs": epochs, "learning_rate": learning_rate, **settings}
    how = build(TuningSettings, given, "finetune")
    if bool(text) == bool(calibration):
        raise ConfigError("finetune: give either `text` or a `calibration` to train on")
    out, place = Path(out), pick_device(device)
    compressed, original = model_folder(compressed), model_folder(original)
    method = method or _method_of(compressed)
    if not isinstance(method, Tunable):
        raise ConfigError(
            f"{compressed}: {method_name(method)} has nothing to finetune block by block; "
            "compress with cluscomp or lillama"
        )
    decided = {
        "run": compressed.name,
        "method": method_name(method),
        **asdict(how),
        "method_settings": asdict(method),
        "seed": seed,
    }
    with calibrated_artifact(
        out,
        stage="finetune",
        settings=decided,
        inputs={"compressed": compressed, "model": original},
        model=original,
        text=text,
        calibration=calibration,
        windows=windows,
        length=length,
        device=place,
        scratch=scratch,
        force=force,
    ) as (folder, store, known):
        taught = Path(str(known))  # one was named, or made
        check_calibration(taught, fingerprint(original), original.name)
        student_checkpoint = Checkpoint(compressed)
        teacher, student = (
            BlockWalk(skeleton(c), c, device=place, autocast=how.autocast)
            for c in (Checkpoint(original), student_checkpoint)
        )
        taken, validation = load_windows(taught)
        blocks = tune_blocks(
            teacher, student, method, taken, validation, how, seed=seed, store=store
        )
        rewrite_model(student_checkpoint, blocks, folder)
    return out


def _method_of(compressed: Path) -> Method:
    """Return the method by which a model was compressed, from its provenance."""
    has_provenance = (compressed / PROVENANCE).is_file()  # not where transformers saved it again
    recorded = read_provenance(compressed)["settings"] if has_provenance else {}
    name = recorded.get("method")
    if name not in known_methods():
        raise ConfigError(
            f"{compressed}: was compressed by {name or 'some method'}: give it as `method`"
        )
    of_method = {field.name for field in fields(method_class(name))}
    values = recorded.get("method_settings", recorded)
    return build_method(name, {k: v for k, v in values.items() if k in of_method}, "finetune")
