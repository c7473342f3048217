"""Write a compressed model, or a base with a delta, for tools that know nothing of llmpress."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmpress.architectures import LEFT_MULTIPLIED, matches, stored_name
from llmpress.artifacts import artifact_folder, fingerprint, write_json
from llmpress.blocks import progress
from llmpress.checkpoints import Checkpoint, CheckpointWriter, copy_companions
from llmpress.delta_files import EXACT, DeltaFolder
from llmpress.errors import ArtifactError
from llmpress.hf import compressed_layers
from llmpress.layers import KINDS, CompressedLinear, LowRankLinear, filled_layer


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
    source = Checkpoint(Path(model))
    inputs = {"model": source.folder} | ({"delta": Path(delta)} if delta else {})
    with artifact_folder(
        Path(out),
        stage="export",
        settings={"dtype": str(dtype).removeprefix("torch.")},
        inputs=inputs,
    ) as folder:
        change = _opened_delta(source, Path(delta)) if delta else None
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


def _opened_delta(base: Checkpoint, folder: Path) -> DeltaFolder:
    delta = DeltaFolder(folder, "compressed_delta")
    needed = delta.header["base"]
    if (found := fingerprint(base.folder)) != needed["fingerprint"]:
        raise ArtifactError(
            f"{folder}: made on base {needed['name']} ({needed['fingerprint'][:12]}), but "
            f"{base.folder} is another model ({found[:12]}); name the delta's own base"
        )
    return delta


def _dense_tensors(source: Checkpoint, delta: DeltaFolder | None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense model by name, those of layers in fp32."""
    entries = compressed_layers(source)
    changes = delta.header["layers"] if delta else {}
    exact = set(delta.exact_names()) if delta else set()
    linears = dict(source.skeleton().named_modules())
    stored = set(source.names())
    packed = {name for name in stored if name.rpartition(".")[0] in entries}
    biases = {name for name in packed if name.endswith(".bias")}
    weights = {f"{name}.weight" for name in entries}
    for name in progress(sorted((stored - packed) | biases | weights | exact), "export"):
        layer = name.removesuffix(".weight")
        if name in exact and delta is not None:
            yield name, delta.tensor(EXACT + name)
            continue
        if name in weights:
            tensor = _filled(layer, entries[layer], linears.get(layer), source).dequantize()
        else:
            tensor = source.tensor(name)
        if layer in changes and delta is not None:
            out_features, in_features = changes[layer]["shape"]
            like = nn.Linear(in_features, out_features, bias=False, device="meta")
            tensor = tensor.float() + _filled(layer, changes[layer], like, delta).dequantize()
        yield name, tensor


def _factored_tensors(source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    entries = compressed_layers(source)
    linears = dict(source.skeleton().named_modules())
    for name, entry in progress(sorted(entries.items()), "export"):
        layer = _filled(name, entry, linears.get(name), source)
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


def _filled(
    name: str, entry: Mapping[str, Any], linear: nn.Module | None, source: Checkpoint | DeltaFolder
) -> CompressedLinear:
    """Return a stored layer; ``linear`` tells its shape and whether it has a bias."""
    if not isinstance(linear, nn.Linear):
        raise ArtifactError(f"{name}: compressed in the artifact, but the model has no such linear")
    tensors = source.tensors(f"{name}.")
    shape = (linear.in_features, linear.out_features)
    try:
        return filled_layer(entry, *shape, tensors, bias=linear.bias is not None)
    except ValueError as error:
        raise ArtifactError(f"{source.folder}: layer {name} is damaged: {error}") from None


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
