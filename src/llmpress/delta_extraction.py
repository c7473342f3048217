"""Fine-tuned minus base, tensor by tensor: what is linear, what is kept exactly."""

from pathlib import Path

import torch
from torch import Tensor

from llmpress.architectures import block_linears
from llmpress.artifacts import artifact_folder
from llmpress.blocks import progress
from llmpress.checkpoints import Checkpoint
from llmpress.delta_files import EXACT, DeltaWriter
from llmpress.errors import ArtifactError, NumericalError


def extract_delta(
    base: Checkpoint, finetuned: Checkpoint, folder: Path, *, max_shard_bytes: int = 1 << 30
) -> None:
    """Write the delta of a fine-tuned model; memory is bounded by a shard, not by the model.

    Weights of linear layers inside decoder blocks are subtracted in fp32 (both sides at their own
    dtype first). Every other tensor that changed, or exists in the fine-tuned model only, is kept
    as it is, at its own dtype: norms, biases, embeddings with a grown vocabulary, changed heads.
    Tensors without any change are left out and listed.

    Args:
        base: The model that was fine-tuned.
        finetuned: What became of it.
        folder: Existing folder to write delta.json and its tensors into.
        max_shard_bytes: Size of a shard.

    Raises:
        ArtifactError: A tensor that the fine-tuned model lacks, or linears of different shapes.
        NumericalError: NaN or Inf in a delta.
    """
    in_base = set(base.names())
    layers = [f"{name}.weight" for block in block_linears(finetuned.skeleton()) for name in block]
    linears = [name for name in layers if name in in_base]
    _check_layout(base, finetuned, linears)
    others = sorted(set(finetuned.names()) - set(linears))
    writer = DeltaWriter(folder, max_shard_bytes)
    changed: dict[str, list[int]] = {}
    exact: dict[str, int] = {}
    unchanged: list[str] = []
    for position, name in enumerate(progress(linears + others, "extract delta")):
        new = finetuned.tensor(name)
        old = base.tensor(name) if name in in_base else None
        if old is not None and not _differ(old, new):
            unchanged.append(name)
        elif old is not None and position < len(linears):
            delta = new.float() - old.float()
            if not bool(torch.isfinite(delta).all()):
                raise NumericalError(
                    f"{name}: the delta holds NaN or Inf; check {finetuned.folder}"
                )
            writer.add(name, delta)
            changed[name.removesuffix(".weight")] = list(delta.shape)
        else:
            writer.add(EXACT + name, new)
            exact[name] = new.numel()
    header = {
        "base": {"name": base.folder.name, "fingerprint": base.fingerprint},
        "finetuned": {"name": finetuned.folder.name, "fingerprint": finetuned.fingerprint},
        "linears": changed,
        "exact": exact,
        "unchanged": unchanged,
        "tie_word_embeddings": bool(finetuned.config.tie_word_embeddings),
        "model_weights": sum(torch.Size(finetuned.shape(n)).numel() for n in finetuned.names()),
    }
    writer.close("delta", header)


def extract_delta_artifact(base: Path, finetuned: Path, out: Path) -> None:
    """Write the delta of two model folders as an artifact; see `extract_delta`."""
    with artifact_folder(
        out,
        stage="extract_delta",
        settings={"base": base.name},
        inputs={"base": base, "finetuned": finetuned},
    ) as folder:
        extract_delta(Checkpoint(base), Checkpoint(finetuned), folder)


def _check_layout(base: Checkpoint, finetuned: Checkpoint, linears: list[str]) -> None:
    """Refuse pairs of models that are no base and its fine-tuned version."""
    where = f"{finetuned.folder} is not fine-tuned from {base.folder}"
    tied = "lm_head.weight" if finetuned.config.tie_word_embeddings else None
    for name in sorted(set(base.names()) - set(finetuned.names()) - {tied}):
        raise ArtifactError(f"{where}: it lacks the base's tensor {name!r}")
    for name in linears:
        if base.shape(name) != finetuned.shape(name):
            raise ArtifactError(
                f"{where}: {name} is {list(finetuned.shape(name))} there "
                f"and {list(base.shape(name))} in the base"
            )
    if not linears:
        raise ArtifactError(f"{where}: no linear layer of a decoder block is in both")


def _differ(old: Tensor, new: Tensor) -> bool:
    """Whether any entry differs; a NaN counts as different."""
    if old.shape != new.shape:
        return True
    return (
        bool((old != new).any())
        if old.dtype == new.dtype
        else bool((old.float() != new.float()).any())
    )
