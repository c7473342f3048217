"""Write a low-rank model with two plain linears in place of each low-rank layer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpress.core.artifacts import artifact_folder, claim, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.errors import ArtifactError
from llmpress.core.progress import progress
from llmpress.models.architectures import LEFT_MULTIPLIED, compressed_linear, matches
from llmpress.models.checkpoints.compressed import compressed_layers, model_config
from llmpress.models.checkpoints.dense_view import stored_layer
from llmpress.models.checkpoints.files import (
    Checkpoint,
    CheckpointWriter,
    block_linears,
    copy_companions,
)
from llmpress.models.folders import model_folder
from llmpress.nn.layers import layer_class


def export_factors(
    model: Path | str,
    *,
    out: Path | str,
    dtype: torch.dtype | str = torch.bfloat16,
    force: bool = False,
) -> Path:
    """Write a low-rank model with each compressed matrix as two plain linears in a row.

    Beside the configuration of the original lie tensors under the names that its modules get when
    each low-rank linear becomes ``nn.Sequential(nn.Linear(in, rank, bias=False), nn.Linear(rank,
    out))``: ``NAME.0.weight`` and ``NAME.1.weight``. Pivoted matrices take ``rank²`` numbers more.
    Where a module multiplies by a linear's weight itself, that weight is written dense.

    Args:
        model: A model compressed to layers of low rank, as by ``lillama`` or ``svd``.
        out: Folder to write: config.json without a trace of compression, safetensors, tokenizer.
        dtype: What linears of the decoder blocks are stored in; all else keeps its dtype.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: A damaged folder, a model that holds no low-rank layer, or ``out`` exists.
        ConfigError: Another dtype than bfloat16, float16 and float32.
    """
    out, dtype = Path(out), pick_dtype(dtype)
    source = Checkpoint(model_folder(model))
    settings = {"dtype": str(dtype).removeprefix("torch."), "form": "factors"}
    inputs = {"model": source.folder}
    with (
        claim(out, force=force, inputs=inputs.values()) as target,
        artifact_folder(target, stage="export", settings=settings, inputs=inputs) as folder,
    ):
        if not any(_has_factors(*item) for item in compressed_layers(source).items()):
            raise ArtifactError(
                f"{source.folder}: holds no low-rank layer; --dense writes any compressed model"
            )
        writer = CheckpointWriter(folder)
        for name, tensor in _factored_tensors(source, dtype):
            writer.add(name, tensor)
        writer.close()
        write_json(folder / "config.json", model_config(source, dtype))
        copy_companions(source.folder, folder)
    return out


def _factored_tensors(source: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    entries = compressed_layers(source)
    skeleton = source.skeleton()
    linears = {f"{name}.weight" for block in block_linears(skeleton) for name in block}
    for name, entry in progress(sorted(entries.items()), "export"):
        layer = stored_layer(name, entry, compressed_linear(name, skeleton), source)
        last = name
        if _has_factors(name, entry):
            left, right = layer.factors()
            last = f"{name}.1"
            yield f"{name}.0.weight", right.to(dtype)
            yield f"{last}.weight", left.to(dtype)
        else:
            yield f"{name}.weight", layer.dequantize().to(dtype)
        if layer.bias is not None:
            yield f"{last}.bias", layer.bias
    for name in source.names():
        if name.rpartition(".")[0] not in entries:
            tensor = source.tensor(name)
            yield name, tensor.to(dtype) if name in linears else tensor


def _has_factors(name: str, entry: Mapping[str, Any]) -> bool:
    return layer_class(entry).has_factors and not matches(name, LEFT_MULTIPLIED)
