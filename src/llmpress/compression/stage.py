"""Compress a model on disk by one method into a loadable folder: what stage and command share."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from llmpress.calibration.files import check_calibration, load_statistics
from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.artifacts import artifact_folder, fingerprint
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.core.resume import SCRATCH, BlockStore
from llmpress.methods.base import Method, Shape
from llmpress.models.checkpoints.compressed import is_compressed
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.experts import expert_matrix
from llmpress.models.loading import skeleton


def compress_model(
    model: Path,
    out: Path,
    *,
    method_name: str,
    method: Method,
    calibration: Path | None,
    seed: int,
    device: torch.device,
    scratch: Path = SCRATCH,
) -> None:
    """Compress every linear layer of a model's decoder blocks.

    A killed call continues after its last finished block when it is repeated.

    Args:
        model: The original: a Hugging Face folder of safetensors.
        out: The artifact to write: packed weights, configuration, tokenizer, layers.json.
        method_name: Name of the method, for the record.
        method: Its settings.
        calibration: A calibration artifact of the same model; None compresses without statistics.
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the finished blocks of an unfinished call.

    Raises:
        ArtifactError: No model, a model that is compressed already, or a damaged folder.
        SourceError: A model without linear layers in its decoder blocks.
        NumericalError: A weight that cannot be compressed; names the layer.
        ValueError: Settings that no layer of this model allows.
    """
    settings = {"method": method_name, **asdict(method), "seed": seed}
    inputs = {"model": model} | ({"calibration": calibration} if calibration else {})
    store = BlockStore(
        f"compress-{out.name}",
        {**settings, **{role: fingerprint(path) for role, path in inputs.items()}},
        scratch,
    )
    with (
        store,  # kept until the artifact is complete
        artifact_folder(
            out, stage="compress", settings=settings, inputs=inputs, seconds=store.seconds
        ) as folder,
    ):
        checkpoint = Checkpoint(model)
        if is_compressed(checkpoint):
            raise ArtifactError(f"{model}: is compressed already; compress its original")
        if calibration:
            check_calibration(calibration, fingerprint(model), model.name)
        blocks = model_shapes(skeleton(checkpoint))
        _check_weights(checkpoint, blocks)
        model_weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
        layers = compress_layers(
            blocks,
            checkpoint,
            method,
            load_statistics(calibration) if calibration else None,
            model_weights=model_weights,
            seed=seed,
            device=device,
            store=store,
        )
        write_compressed_model(checkpoint, layers, model_weights, folder)


def _check_weights(checkpoint: Checkpoint, blocks: list[dict[str, Shape]]) -> None:
    """Refuse a checkpoint that lacks a layer, before anything is computed."""
    if not any(blocks):
        raise SourceError(
            f"{checkpoint.folder}: {checkpoint.config.model_type} has no linear layer inside its "
            "decoder blocks (nn.Linear), so there is nothing to compress"
        )
    stored = set(checkpoint.names())
    for name, shape in (item for block in blocks for item in block.items()):
        if f"{name}.weight" not in stored and expert_matrix(name):
            raise SourceError(
                f"{checkpoint.folder}: its experts are not stored one tensor a matrix "
                f"('{name}.weight'), and llmpress does not take such files apart; save the model "
                "with transformers' save_pretrained(), which separates the experts of most"
            )
        if f"{name}.weight" not in stored:
            raise ArtifactError(
                f"{checkpoint.folder}: holds no tensor '{name}.weight'; fetch the model again"
            )
        if (found := checkpoint.shape(f"{name}.weight")) != tuple(shape):
            raise ArtifactError(
                f"{checkpoint.folder}: {name}.weight is {list(found)}, its configuration needs "
                f"{list(shape)}; fetch the model again"
            )
