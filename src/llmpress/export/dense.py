"""Write a compressed model, or a base with a delta, for tools that know nothing of llmpress."""

from pathlib import Path

import torch

from llmpress.core.artifacts import artifact_folder, claim, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.progress import progress
from llmpress.export.older import name_older_tokenizer, with_older_names
from llmpress.models.checkpoints.compressed import model_config
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.folders import model_folder
from llmpress.models.loading import check_complete


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
        dtype: What linears of the decoder blocks are stored in; all else keeps its dtype.
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
        dense = source
        if delta:
            dense = FinetunedCheckpoint(source, DeltaFolder(Path(delta), "compressed_delta"))
        writer = CheckpointWriter(folder)
        for name, tensor in progress(sorted(dense.published(dtype).items()), "export"):
            writer.add(name, tensor.read())
        writer.close()
        write_json(folder / "config.json", with_older_names(model_config(dense, dtype)))
        copy_companions(Path(tokenizer) if tokenizer else source.folder, folder)
        name_older_tokenizer(folder)
        check_complete(Checkpoint(folder))
    return out
