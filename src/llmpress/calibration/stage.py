"""Calibrate a model on disk with some text: what stage, command and Python share."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import save_calibration
from llmpress.calibration.settings import CalibrationSettings
from llmpress.calibration.texts import read_texts, text_artifacts
from llmpress.core.artifacts import artifact_folder, claim, fingerprint
from llmpress.core.devices import pick_device
from llmpress.core.errors import ConfigError
from llmpress.core.resume import BlockStore, scratch_folder
from llmpress.data.corpora import Text, text_paths, token_windows
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.folders import model_folder
from llmpress.models.loading import load_tokenizer, skeleton
from llmpress.models.walk import BlockWalk


def calibrate_model(
    model: Path | str,
    *,
    text: Text,
    out: Path | str,
    windows: int = 16,
    length: int = 512,
    validation_windows: int | None = None,
    sensitivity_windows: int = 4,
    autocast: bool = True,
    delta: Path | str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    force: bool = False,
) -> Path:
    """Run a model over some text and store the statistics that methods use.

    Args:
        model: A Hugging Face folder of safetensors; with ``delta`` the base.
        text: What it reads; see `read_texts`. Each text gives the same number of windows.
        out: Folder to write: token windows, and the second moments of all linears' inputs.
        windows: Token windows of each text.
        length: Tokens of a window.
        validation_windows: Of each text, from its other documents, that finetuning is judged by; an
            eighth of ``windows`` by default.
        sensitivity_windows: Of each text, of which gradients are taken too.
        autocast: Run the model in bf16 where a matrix product allows it.
        delta: An extracted delta: then the model with it is calibrated, the fine-tuned one.
        seed: Of the labels that sensitivities are measured with; same seed, same bytes.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ConfigError: No text, or no such device.
        SourceError: A text is too short.
        ArtifactError: No model, a damaged one, or ``out`` exists.
        ValueError: Fewer than one window or two tokens.
    """
    out, model, place = Path(out), model_folder(model), pick_device(device)
    tokenizer = load_tokenizer(model)
    texts, artifacts = read_texts(text, tokenizer), text_artifacts(text)
    tasks = tuple(name for name in texts if f"task {name}" in artifacts)
    if len(tasks) == len(texts):
        tasks = ()  # some text has to be a corpus there
    settings = CalibrationSettings(
        tuple(name for name in texts if name not in tasks),
        windows,
        length,
        max(1, windows // 8) if validation_windows is None else validation_windows,
        sensitivity_windows,
        autocast,
        tasks,
    )
    recorded = {**asdict(settings), "seed": seed}
    if not settings.tasks:
        del recorded["tasks"]
    opened = None if delta is None else DeltaFolder(Path(delta), "delta")
    roles = {"model": model} if opened is None else {"base": model, "delta": opened.folder}
    roles |= artifacts
    with (
        claim(out, force=force, inputs=(model, delta, *text_paths(text))) as target,
        artifact_folder(target, stage="calibrate", settings=recorded, inputs=roles) as folder,
    ):
        taken, validation = (
            torch.cat([token_windows(part, tokenizer, length, count) for part in parts])
            for parts, count in (
                ([text.statistics for text in texts.values()], windows),
                ([text.validation for text in texts.values()], settings.validation_windows),
            )
        )
        checkpoint = Checkpoint(model)
        if opened is not None:
            checkpoint = FinetunedCheckpoint(dense_checkpoint(model), opened)
        walk = BlockWalk(skeleton(checkpoint), checkpoint, device=place, autocast=autocast)
        per_text = taken.view(len(texts), windows, -1)
        felt = per_text[:, :sensitivity_windows].reshape(-1, length)
        save_calibration(walk, taken, validation, folder, felt, seed)
    return out


@contextmanager
def calibrated_artifact(
    out: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | None],
    model: Path | None,
    text: Text | None,
    calibration: Path | str | None,
    windows: int,
    length: int,
    device: torch.device,
    scratch: Path | str | None,
    force: bool,
    delta: Path | str | None = None,
) -> Iterator[tuple[Path, BlockStore, Path | None]]:
    """Make an artifact block by block, with a calibration; a rerun continues after the last block.

    Args:
        out: The artifact's folder.
        stage: What makes it.
        settings: The settings it is made with, its seed among them.
        inputs: Folders it is made from, by role; the calibration is added.
        model: What is calibrated on ``text``.
        text: As for `calibrate_model`.
        calibration: What that wrote, instead of ``text``.
        windows: Token windows of each text.
        length: Tokens of a window.
        device: Where to compute.
        scratch: Folder for the finished blocks; by default beside ``out``.
        force: Replace ``out`` where it exists.
        delta: What is put on ``model`` to be calibrated.

    Yields:
        The folder to write into, finished blocks, and the calibration: the one that was named, or
        one made from text for the moment, beside the folder that is being written, or none.

    Raises:
        ArtifactError: An input is missing or damaged, or ``out`` is not free.
        ConfigError: Both a text and a calibration.
    """
    if text and calibration:
        raise ConfigError(
            "`text` and `calibration` exclude each other: give one of them (--text, --calibration)"
        )
    known = None if calibration is None else Path(calibration)
    read = (*inputs.values(), model, known, *text_paths(text))
    with ExitStack() as held:
        target = held.enter_context(claim(out, force=force, inputs=read))
        if text:
            near = target.folder
            temporary = tempfile.TemporaryDirectory(prefix=f"{near.name}.", dir=near.parent)
            known = calibrate_model(
                model or Path(),
                text=text,
                out=Path(held.enter_context(temporary)) / "calibration",
                windows=windows,
                length=length,
                delta=delta,
                seed=settings["seed"],
                device=device,
            )
        roles = {role: p for role, p in {**inputs, "calibration": known}.items() if p is not None}
        prints = {role: fingerprint(path) for role, path in roles.items()}
        task, kept = f"{stage.replace('_', '-')}-{out.name}", Path(scratch or scratch_folder(out))
        store = held.enter_context(BlockStore(task, {**settings, **prints}, kept))
        folder = artifact_folder(
            target, stage=stage, settings=settings, inputs=roles, seconds=store.seconds
        )
        yield held.enter_context(folder), store, known
