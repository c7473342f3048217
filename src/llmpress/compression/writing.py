"""Write compressed models: Hugging Face folders with packed weights and a record of every layer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmpress.core.artifacts import write_json
from llmpress.core.records import LayerRecord, Records, total_size, write_records
from llmpress.models.checkpoints.compressed import kept_dtype, model_config
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.nn.layers import CompressedLinear, layer_entry


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
            entries[name] = layer_entry(layer.kind, layer.spec())
            for key, tensor in layer.tensors().items():
                writer.add(f"{name}.{key}", tensor)
    replaced = {f"{name}.weight" for name in entries}
    linears = {f"{record.name}.weight" for record in records}
    for name in source.names():
        if name not in replaced:
            kept = kept_dtype(source.dtype(name), linear=name in linears)
            writer.add(name, source.tensor(name).to(kept))
    writer.close(source.guard(entries))
    write_json(folder / "config.json", model_config(source, None, entries))
    copy_companions(source.folder, folder)
    write_records(folder, Records(tuple(records), total_size(records, model_weights)))
