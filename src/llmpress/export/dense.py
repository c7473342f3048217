"""Write a compressed model, or a base with a delta, for tools that know nothing of llmpress."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpress.core.artifacts import artifact_folder, write_json
from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import LEFT_MULTIPLIED, matches, stored_name
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import (
    compressed_linear,
    delta_layer,
    dense_checkpoint,
    stored_layer,
)
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.checkpoints.finetuned_view import check_base
from llmpress.models.loading import compressed_layers
from llmpress.models.walk import progress
from llmpress.nn.layers import KINDS, LowRankLinear


def export_dense(
    model: Path | str,
    out: Path | str,
    *,
    delta: Path | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Path | str | None = None,
) -> None:
    """Write the dense model that a compressed one, or a base with a delta, stands for.

    Layer after layer is computed in fp32 and rounded once; memory is one layer and one shard of the
    checkpoint. The same inputs give the same bytes.

    Args:
        model: A model folder, compressed or plain.
        out: Where to write: config.json without a trace of compression, safetensors, tokenizer.
        delta: A compressed delta that was made on ``model``.
        dtype: What floats are stored in.
        tokenizer: Folder to take tokenizer files from; by default ``model``. A delta with added
            tokens needs the fine-tuned model's.

    Raises:
        ArtifactError: A damaged folder, or a delta of another base.
    """
    source = dense_checkpoint(Path(model))
    inputs = {"model": source.folder} | ({"delta": Path(delta)} if delta else {})
    with artifact_folder(
        Path(out),
        stage="export",
        settings={"dtype": str(dtype).removeprefix("torch.")},
        inputs=inputs,
    ) as folder:
        change = DeltaFolder(Path(delta), "compressed_delta") if delta else None
        if change is not None:
            check_base(change, source)
        writer = CheckpointWriter(folder)
        shapes = {}
        for name, tensor in _dense_tensors(source, change):
            shapes[name] = tensor.shape
            stored = stored_name(source.config.model_type, name)
            writer.add(stored, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        writer.close()
        config = _plain_config(source, change, shapes, dtype)
        write_json(folder / "config.json", config)
        copy_companions(Path(tokenizer) if tokenizer else source.folder, folder)


def export_factors(
    model: Path | str, out: Path | str, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a low-rank model with each compressed matrix as two plain linears in a row.

    Beside the configuration of the original lie tensors under the names that its modules get when
    each low-rank linear becomes ``nn.Sequential(nn.Linear(in, rank, bias=False), nn.Linear(rank,
    out))``: ``NAME.0.weight`` and ``NAME.1.weight``. Pivoted matrices take ``rank²`` numbers more.
    Where a module multiplies by a linear's weight itself, that weight is written dense.

    Args:
        model: A model that ``lillama`` or ``svd`` compressed.
        out: Where to write: config.json without a trace of compression, safetensors, tokenizer.
        dtype: What floats are stored in.

    Raises:
        ArtifactError: A damaged folder, or a model that holds no low-rank layer.
    """
    source = Checkpoint(Path(model))
    settings = {"dtype": str(dtype).removeprefix("torch."), "form": "factors"}
    with artifact_folder(
        Path(out), stage="export", settings=settings, inputs={"model": source.folder}
    ) as folder:
        if not any(_has_factors(*item) for item in compressed_layers(source).items()):
            raise ArtifactError(
                f"{source.folder}: holds no low-rank layer; --dense writes any compressed model"
            )
        writer = CheckpointWriter(folder)
        for name, tensor in _factored_tensors(source):
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        writer.close()
        write_json(folder / "config.json", _plain_config(source, None, {}, dtype))
        copy_companions(source.folder, folder)


def _dense_tensors(source: Checkpoint, delta: DeltaFolder | None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense model by name, those of layers in fp32."""
    changes = delta.header["layers"] if delta else {}
    exact = set(delta.exact_names()) if delta else set()
    stored = set(source.names())
    for name in progress(sorted(stored | exact), "export"):
        layer = name.removesuffix(".weight")
        tensor = source.tensor(name) if name in stored else None
        if delta is not None and name in exact:
            yield name, delta.exact(name, tensor)
        elif tensor is not None and delta is not None and layer in changes:
            yield name, tensor.float() + delta_layer(layer, delta).dequantize()
        elif tensor is not None:
            yield name, tensor


def _factored_tensors(source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    entries = compressed_layers(source)
    skeleton = source.skeleton()
    for name, entry in progress(sorted(entries.items()), "export"):
        layer = stored_layer(name, entry, compressed_linear(name, skeleton), source)
        last = name
        if isinstance(layer, LowRankLinear) and _has_factors(name, entry):
            left, right = layer.factors()
            last = f"{name}.1"
            yield f"{name}.0.weight", right
            yield f"{last}.weight", left
        else:
            yield f"{name}.weight", layer.dequantize()
        if layer.bias is not None:
            yield f"{last}.bias", layer.bias
    for name in source.names():
        if name.rpartition(".")[0] not in entries:
            yield name, source.tensor(name)


def _has_factors(name: str, entry: Mapping[str, Any]) -> bool:
    return issubclass(KINDS[entry["kind"]], LowRankLinear) and not matches(name, LEFT_MULTIPLIED)


def _plain_config(
    source: Checkpoint,
    delta: DeltaFolder | None,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
) -> dict[str, Any]:
    config = source.plain_config()
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if delta is not None:
        config["tie_word_embeddings"] = bool(delta.header["tie_word_embeddings"])
        model = source.skeleton()
        embeddings = model.get_input_embeddings()
        name = next(n for n, module in model.named_modules() if module is embeddings)
        config["vocab_size"] = shapes[f"{name}.weight"][0]
    return config
