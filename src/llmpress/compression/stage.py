"""Compress a model on disk by one method into a folder that transformers opens."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import check_calibration, load_statistics
from llmpress.calibration.stage import calibrated_artifact
from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.artifacts import fingerprint
from llmpress.core.devices import pick_device
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.corpora import Text
from llmpress.methods.base import Method, Shape
from llmpress.methods.registry import check_statistics, choose_method, method_name
from llmpress.models.architectures import WORTH_SAYING, left_out
from llmpress.models.checkpoints.compressed import is_compressed
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.folders import model_folder
from llmpress.models.loading import check_complete, skeleton

logger = logging.getLogger(__name__)


def compress_model(
    model: Path | str,
    *,
    method: Method | str,
    out: Path | str,
    text: Text | None = None,
    calibration: Path | str | None = None,
    windows: int = 16,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device | None = None,
    scratch: Path | str | None = None,
    force: bool = False,
    **settings: Any,
) -> Path:
    """Compress every linear layer of a model's decoder blocks.

    A killed call continues after its last finished block when it is repeated.

    Args:
        model: The original: a Hugging Face folder of safetensors.
        method: A method's name, its settings as keywords of this function; or a method.
        out: Folder to write: packed weights, configuration, tokenizer, layers.json. transformers
            opens it after ``import llmpress``.
        text: What to calibrate on first, for the moment; see `read_texts`.
        calibration: What `calibrate_model` wrote for this model, instead of ``text``.
        windows: Token windows of each text.
        length: Tokens of a window.
        seed: Same seed, same bytes.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        scratch: Folder for the finished blocks of an unfinished call; by default beside ``out``.
        force: Replace ``out`` where it exists.
        **settings: Of the method; ``bits`` for every method that is told bits.

    Returns:
        ``out``.

    Raises:
        ConfigError: An unknown method or setting, or no text for a method that needs some.
        ArtifactError: No model, a compressed one, a damaged folder, or ``out`` exists.
        SourceError: A model without linear layers in its decoder blocks, or too little text.
        NumericalError: A weight that cannot be compressed; names the layer.
        ValueError: Settings that no layer of this model allows.
    """
    chosen = choose_method(method, settings)
    check_statistics(chosen, given=bool(text or calibration))
    out, model, place = Path(out), model_folder(model), pick_device(device)
    with calibrated_artifact(
        out,
        stage="compress",
        settings={"method": method_name(chosen), **asdict(chosen), "seed": seed},
        inputs={"model": model},
        model=model,
        text=text,
        calibration=calibration,
        windows=windows,
        length=length,
        device=place,
        scratch=scratch,
        force=force,
    ) as (folder, store, known):
        checkpoint = Checkpoint(model)
        if is_compressed(checkpoint):
            raise ArtifactError(f"{model}: is compressed already; compress its original")
        if known:
            check_calibration(known, fingerprint(model), model.name)
        plain = skeleton(checkpoint)
        blocks = model_shapes(plain)
        if not any(blocks):
            raise SourceError(
                f"{model}: {checkpoint.config.model_type} has no linear layer inside its "
                "decoder blocks (nn.Linear), so there is nothing to compress"
            )
        check_complete(checkpoint, plain)
        _warn_of_rest(blocks, left_out(plain))
        model_weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
        layers = compress_layers(
            blocks,
            checkpoint,
            chosen,
            load_statistics(known) if known else None,
            model_weights=model_weights,
            seed=seed,
            device=place,
            store=store,
        )
        write_compressed_model(checkpoint, layers, model_weights, folder)
        check_complete(Checkpoint(folder))
    return out


def _warn_of_rest(blocks: list[dict[str, Shape]], rest: Mapping[str, int]) -> None:
    """Say that a good part of the decoder blocks stays as it is."""
    compressed = sum(math.prod(shape) for block in blocks for shape in block.values())
    if (kept := sum(rest.values())) > WORTH_SAYING * (compressed + kept):
        logger.warning(
            "%.0f %% of the decoder blocks' weights are no linear layers and stay as they are: %s; "
            "bits per weight are of the others",
            100 * kept / (compressed + kept),
            ", ".join(sorted(rest, key=lambda name: -rest[name])[:5]),
        )
