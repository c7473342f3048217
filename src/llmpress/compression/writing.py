"""Write compressed models: Hugging Face folders with packed weights and a record of every layer."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpress.compression.layers import LayerRecord, totals
from llmpress.core.artifacts import read_json, write_json
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.quantizer import FORMAT_VERSION, LLMPressConfig
from llmpress.nn.layers import CompressedLinear
from llmpress.tuning.blocks import BlockRecord

REST_DTYPE = torch.bfloat16
"""What the tensors that no method compresses (embeddings, norms, dense layers) are stored in."""


def write_compressed_model(
    source: Checkpoint,
    layers: Iterable[tuple[str, CompressedLinear | None, LayerRecord]],
    model_weights: int,
    folder: Path,
) -> None:
    """Write a compressed model as a Hugging Face folder, holding one shard in memory.

    Args:
        source: The original model: configuration, tokenizer and everything that is not compressed.
        layers: Compressed layers as `compress_layers` yields them; None leaves a layer dense.
        model_weights: Number of weights of the original model.
        folder: Where to write: config.json, safetensors, tokenizer files, layers.json.
    """
    writer = CheckpointWriter(folder)
    entries: dict[str, dict[str, Any]] = {}
    records: list[LayerRecord] = []
    for name, layer, record in layers:
        records.append(record)
        if layer is not None:
            entries[name] = {"kind": layer.kind, "spec": layer.spec()}
            for key, tensor in layer.tensors().items():
                writer.add(f"{name}.{key}", tensor)
    replaced = {f"{name}.weight" for name in entries}
    for name in source.names():
        if name not in replaced:
            tensor = source.tensor(name)
            writer.add(name, tensor.to(REST_DTYPE) if tensor.is_floating_point() else tensor)
    writer.close()
    write_model_config(source, entries, folder)
    copy_companions(source.folder, folder)
    write_json(
        folder / "layers.json",
        {"layers": [r.as_entry() for r in records], "totals": totals(records, model_weights)},
    )


def write_model_config(source: Checkpoint, entries: Mapping[str, Any], folder: Path) -> None:
    """Write config.json with the list of compressed layers in it."""
    config = source.plain_config()
    config["dtype"] = str(REST_DTYPE).removeprefix("torch.")
    config["quantization_config"] = LLMPressConfig(entries, FORMAT_VERSION).to_dict()
    write_json(folder / "config.json", config)


def rewrite_model(
    compressed: Checkpoint, blocks: Iterable[tuple[Mapping[str, Tensor], BlockRecord]], folder: Path
) -> None:
    """Write a compressed model again with some of its tensors changed by finetuning.

    Args:
        compressed: A folder that `write_compressed_model` wrote.
        blocks: Trained tensors by full name in their stored dtype, and a record of each block.
        folder: Where to write. Errors of single layers are left out of its layers.json: finetuning
            lets layers drift from their originals to bring the block's output closer.
    """
    writer = CheckpointWriter(folder)
    trained: set[str] = set()
    block_records = []
    for tensors, record in blocks:
        block_records.append(asdict(record))
        trained.update(tensors)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for name in compressed.names():
        if name not in trained:
            writer.add(name, compressed.tensor(name))
    writer.close()
    shutil.copyfile(compressed.folder / "config.json", folder / "config.json")
    copy_companions(compressed.folder, folder)
    layers = read_json(compressed.folder / "layers.json")
    unknown = {"relative_weight_error": None, "relative_output_error": None}
    layers["layers"] = [{**layer, **unknown} for layer in layers["layers"]]
    write_json(folder / "layers.json", {**layers, "blocks": block_records})
