"""Write compressed models: Hugging Face folders with packed weights and a record of every layer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmpress.compression.records import LayerRecord, totals
from llmpress.core.artifacts import write_json
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.quantizer import FORMAT_VERSION, LLMPressConfig
from llmpress.nn.layers import CompressedLinear

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
