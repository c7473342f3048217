"""Fine-tuned minus base, tensor by tensor: what is linear, what is kept exactly."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmpress.core.artifacts import PROVENANCE, artifact_folder, claim
from llmpress.core.errors import ArtifactError, NumericalError
from llmpress.core.progress import progress
from llmpress.models.adapters import is_adapter
from llmpress.models.architectures import block_linears, vocabulary_names
from llmpress.models.checkpoints.adapter_view import finetuned_checkpoint
from llmpress.models.checkpoints.delta_files import (
    DELTA_SHARD_BYTES,
    EXACT,
    EXACT_ROWS,
    DeltaWriter,
)
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_config import config_changes
from llmpress.models.folders import model_folder

OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""What transformers stored once and computes now, whatever the architecture."""


def write_delta(
    base: Checkpoint,
    finetuned: Checkpoint,
    folder: Path,
    *,
    max_shard_bytes: int = DELTA_SHARD_BYTES,
) -> None:
    """Write the delta of a fine-tuned model; memory is bounded by a shard, not by the model.

    Weights of linear layers inside decoder blocks are subtracted in fp32 (both sides at their own
    dtype first). Every other tensor that changed, or exists in the fine-tuned model only, is kept
    as it is, at its own dtype: norms, biases, changed embeddings and heads. Of a matrix of which
    fewer than half of the rows differ, such as embeddings of a grown vocabulary, these rows are
    kept. Tensors without any change are left out and listed; a tensor is unchanged when rounding
    the base's to the fine-tuned model's dtype gives it: small steps in fp32 count. What differs of
    the configuration comes along.

    Args:
        base: The model that was fine-tuned.
        finetuned: What became of it.
        folder: Existing folder to write delta.json and its tensors into.
        max_shard_bytes: Size of a shard.

    Raises:
        ArtifactError: Another architecture, a tensor that the fine-tuned model lacks or has no
            place for, or linears of different shapes.
        NumericalError: NaN or Inf in a delta.
    """
    in_base, model = set(base.names()), finetuned.skeleton()
    layers = [f"{name}.weight" for block in block_linears(model) for name in block]
    linears = [name for name in layers if name in in_base]
    names = _placed(finetuned, model)
    _check_layout(base, finetuned, linears, names)
    others = sorted(names - set(linears))
    writer = DeltaWriter(folder, max_shard_bytes)
    changed: dict[str, list[int]] = {}
    exact: dict[str, int] = {}
    exact_rows: dict[str, dict[str, Any]] = {}
    unchanged: list[str] = []
    for position, name in enumerate(progress(linears + others, "extract delta")):
        new = finetuned.tensor(name)
        old = base.tensor(name) if name in in_base else None
        is_linear = position < len(linears)
        if old is not None and _is_same(old, new):
            unchanged.append(name)
        elif old is not None and is_linear:
            delta = new.float() - old.float()
            if not bool(torch.isfinite(delta).all()):
                raise NumericalError(
                    f"{name}: the delta holds NaN or Inf; check {finetuned.folder}"
                )
            writer.add(name, delta)
            changed[name.removesuffix(".weight")] = list(delta.shape)
        elif old is not None and (index := _few_changed_rows(old, new)) is not None:
            writer.add(f"{EXACT_ROWS}{name}.index", index)
            writer.add(f"{EXACT_ROWS}{name}.rows", new[index])
            exact[name] = len(index) * new.shape[1]
            exact_rows[name] = {"shape": list(new.shape), "rows": len(index)}
        else:
            writer.add(EXACT + name, new)
            exact[name] = new.numel()
    header = {
        "base": {"name": base.folder.name, "fingerprint": base.fingerprint},
        "finetuned": {"name": finetuned.folder.name, "fingerprint": finetuned.fingerprint},
        "linears": changed,
        "exact": exact,
        "exact_rows": exact_rows,
        "unchanged": unchanged,
        "tie_word_embeddings": _is_tied(finetuned, model),
        "model_weights": sum(torch.Size(finetuned.shape(n)).numel() for n in names),
    }
    if changes := config_changes(base.config, finetuned.config):
        header["config"] = changes
    writer.close("delta", header)


def extract_delta(
    base: Path | str, finetuned: Path | str, *, out: Path | str, force: bool = False
) -> Path:
    """Subtract a base model from its fine-tuned version, tensor by tensor; see `write_delta`.

    Args:
        base: The model that was fine-tuned; of a compressed one the weights it stands for count.
        finetuned: What became of it: a model folder, or a LoRA adapter of peft on ``base``.
        out: Folder to write.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: A folder that holds no model or a damaged one, two that do not fit, or
            ``out`` exists.
        SourceError: An adapter that cannot be merged.
        NumericalError: NaN or Inf in a delta.
    """
    out, base, finetuned = Path(out), model_folder(base), Path(finetuned)
    if not is_adapter(finetuned):
        finetuned = model_folder(finetuned)
    old = dense_checkpoint(base)
    new = finetuned_checkpoint(old, finetuned)
    foreign = is_adapter(finetuned) and not (finetuned / PROVENANCE).is_file()
    settings = {"base": base.name} | ({"adapter": new.fingerprint} if foreign else {})
    inputs = {"base": base} | ({} if foreign else {"finetuned": finetuned})
    with (
        claim(out, force=force, inputs=(base, finetuned)) as target,
        artifact_folder(target, stage="extract_delta", settings=settings, inputs=inputs) as folder,
    ):
        write_delta(old, new, folder)
    return out


def _placed(finetuned: Checkpoint, model: PreTrainedModel) -> set[str]:
    """Return the names of the stored tensors that have a place in the model.

    Buffers that older versions of transformers stored have none, and none is missed.

    Raises:
        ArtifactError: Other tensors without a place or of another shape, or places without one.
    """
    places, names = model.state_dict(), set(finetuned.names())
    where, kind = finetuned.folder, type(model).__name__
    extra = [n for n in finetuned.ignored if not any(re.search(p, n) for p in OLD_BUFFERS)]
    if extra:
        raise ArtifactError(
            f"{where}: {kind} has no place for its tensor {extra[0]} ({len(extra)} such), so no "
            "delta can carry it; save the language model alone"
        )
    shared = vocabulary_names(model)[1] if model.config.tie_word_embeddings else ""
    for name, place in sorted(places.items()):
        if name not in names and name != shared:
            raise ArtifactError(f"{where}: holds no tensor {name!r}; fetch the model again")
        if name in names and finetuned.shape(name) != tuple(place.shape):
            raise ArtifactError(
                f"{where}: {name} is {list(finetuned.shape(name))}, its configuration needs "
                f"{list(place.shape)}; fetch the model again"
            )
    return names


def _is_tied(checkpoint: Checkpoint, model: PreTrainedModel) -> bool:
    """Whether head and embeddings are one; to transformers they are not if stored ones differ."""
    if not model.config.tie_word_embeddings:
        return False
    pair = [checkpoint.tensor(n) for n in vocabulary_names(model) if n in checkpoint.names()]
    return len(pair) < 2 or not bool(_differing(*pair).any())


def _check_layout(
    base: Checkpoint, finetuned: Checkpoint, linears: list[str], names: set[str]
) -> None:
    """Refuse pairs of models that are no base and its fine-tuned version."""
    where = f"{finetuned.folder} is not fine-tuned from {base.folder}"
    if (new := finetuned.config.model_type) != (old := base.config.model_type):
        raise ArtifactError(f"{where}: it is a {new}, the base a {old}")
    model = base.skeleton()
    tied = vocabulary_names(model) if finetuned.config.tie_word_embeddings else ()
    for name in sorted((set(base.names()) & model.state_dict().keys()) - names - {*tied}):
        raise ArtifactError(f"{where}: it lacks the base's tensor {name!r}")
    for name in linears:
        if base.shape(name) != finetuned.shape(name):
            raise ArtifactError(
                f"{where}: {name} is {list(finetuned.shape(name))} there "
                f"and {list(base.shape(name))} in the base"
            )
    if not linears:
        raise ArtifactError(f"{where}: no linear layer of a decoder block is in both")


def _is_same(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and not bool(_differing(old, new).any())


def _differing(old: Tensor, new: Tensor) -> Tensor:
    """Return where a tensor differs from the base's of one shape, in the dtype of the former.

    Of different dtypes of one width, or where one is no float, the values count. A NaN counts as
    different.
    """
    common = new.dtype
    both_float = old.is_floating_point() and new.is_floating_point()
    if old.dtype != new.dtype and not (both_float and old.dtype.itemsize != new.dtype.itemsize):
        common = torch.float32
    return old.to(common) != new.to(common)


def _few_changed_rows(old: Tensor, new: Tensor) -> Tensor | None:
    """Return the rows of a matrix that changed or were added, int64 ``[k]``.

    None where it is no matrix that only grew, or where half of the rows or more changed.
    """
    if not old.ndim == new.ndim == 2 or old.shape[1] != new.shape[1] or len(old) > len(new):
        return None
    changed = torch.ones(len(new), dtype=torch.bool)
    changed[: len(old)] = _differing(old, new[: len(old)]).any(dim=1)
    index = changed.nonzero().squeeze(1)
    return index if 2 * len(index) < len(new) else None
