"""Write a compressed model again, with what finetuning block by block has changed."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from llmpress.core.records import BlockRecord, write_records
from llmpress.models.checkpoints.compressed import compressed_layers
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.loading import check_complete


def rewrite_model(
    compressed: Checkpoint, blocks: Iterable[tuple[Mapping[str, Tensor], BlockRecord]], folder: Path
) -> None:
    """Write a compressed model again with some of its tensors changed by finetuning.

    Args:
        compressed: A folder that `write_compressed_model` wrote.
        blocks: Trained tensors by full name in their stored dtype, and a record of each block.
        folder: Where to write. Errors of single layers are left out of its records: finetuning
            lets layers drift from their originals to bring the block's output closer.
    """
    writer = CheckpointWriter(folder)
    trained: set[str] = set()
    block_records: list[BlockRecord] = []
    for tensors, record in blocks:
        block_records.append(record)
        trained.update(tensors)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for name in compressed.names():
        if name not in trained:
            writer.add(name, compressed.tensor(name))
    writer.close(compressed.guard(compressed_layers(compressed)))
    shutil.copyfile(compressed.folder / "config.json", folder / "config.json")
    copy_companions(compressed.folder, folder)
    if records := layer_records(compressed.folder):
        write_records(folder, records.finetuned(block_records))
    check_complete(Checkpoint(folder))
