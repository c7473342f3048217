"""Write a compressed model, or a base with a delta, for tools that know nothing of llmpress."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpress.core.artifacts import artifact_folder, claim, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.progress import progress
from llmpress.models.architectures import stored_name
from llmpress.models.checkpoints.compressed import model_config
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import delta_layer, dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.checkpoints.finetuned_view import check_base
from llmpress.models.folders import model_folder


def export_dense(
    model: Path | str,
    *,
    out: Path | str,
    delta: Path | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    tokenizer: Path | str | None = None,
    force: bool = False,
) -> Path:
    """Write the dense model that a compressed one, or a base with a delta, stands for.

    Layer after layer is computed in fp32 and rounded once; memory is one layer and one shard of the
    checkpoint. The same inputs give the same bytes.

    Args:
        model: A model folder, compressed or plain.
        out: Folder to write: config.json without a trace of compression, safetensors, tokenizer.
        delta: A compressed delta that was made on ``model``.
        dtype: What floats are stored in.
        tokenizer: Folder to take tokenizer files from; by default ``model``. A delta with added
            tokens needs the fine-tuned model's.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: A damaged folder, a delta of another base, or ``out`` exists.
        ConfigError: Another dtype than bfloat16, float16 and float32.
    """
    out, dtype = Path(out), pick_dtype(dtype)
    source = dense_checkpoint(model_folder(model))
    inputs = {"model": source.folder} | ({"delta": Path(delta)} if delta else {})
    settings = {"dtype": str(dtype).removeprefix("torch.")}
    with (
        claim(out, force=force, inputs=(*inputs.values(), tokenizer)) as target,
        artifact_folder(target, stage="export", settings=settings, inputs=inputs) as folder,
    ):
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
        write_json(folder / "config.json", _config(source, change, shapes, dtype))
        copy_companions(Path(tokenizer) if tokenizer else source.folder, folder)
    return out


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


def _config(
    source: Checkpoint,
    delta: DeltaFolder | None,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
) -> dict[str, Any]:
    config = model_config(source, dtype)
    if delta is not None:
        config["tie_word_embeddings"] = bool(delta.header["tie_word_embeddings"])
        model = source.skeleton()
        embeddings = model.get_input_embeddings()
        name = next(n for n, module in model.named_modules() if module is embeddings)
        config["vocab_size"] = shapes[f"{name}.weight"][0]
    return config
