"""Write a compressed model again, with what finetuning block by block has changed."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from llmpress.core.artifacts import read_json, write_json
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.tuning.blocks import BlockRecord


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
