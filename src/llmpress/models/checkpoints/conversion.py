"""Stored tensors as a model's, and back, by what transformers says of each architecture.

transformers renames, splits, merges and transposes what published checkpoints hold before a module
has it, and takes that back when it saves. Both are followed here on `LazyTensor`, so that nothing
is read. Experts, which transformers keep fused, go by one tensor a matrix; see
`llmpress.models.experts`.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from llmpress.models.checkpoints.lazy import Index, LazyTensor
from llmpress.models.experts import fused_experts, joined, matrices


class Converted(NamedTuple):
    """What a model has of a checkpoint.

    Attributes:
        tensors: By their names in the model with separate experts.
        ignored: Stored names that the model has no place for, without those that its class expects
            in old files, sorted.
    """

    tensors: dict[str, LazyTensor]
    ignored: list[str]


def model_tensors(model: PreTrainedModel, stored: Mapping[str, LazyTensor]) -> Converted:
    """Return what a model has when transformers opens a checkpoint.

    Args:
        model: As transformers builds it, experts fused; on any device.
        stored: Everything in the checkpoint's files.

    Raises:
        ValueError: Tensors that do not fit together, such as experts of different shapes.
    """
    known, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    found: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    ignored = []
    for key in sorted(stored, key=dot_natural_key):  # as transformers orders what it stacks
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            ignored.append(key)
        elif pattern is None:
            found.setdefault(name, stored[key])
        else:
            converter = merged.setdefault(name, deepcopy(of_pattern[pattern]))
            converter.add_tensor(name, key, pattern, stored[key])
    for name, converter in merged.items():
        try:
            made = converter.convert(name, model=model, config=model.config)
        except RuntimeError as error:
            raise ValueError(f"{name} cannot be made of what is stored: {error}") from None
        found |= {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
    for group in fused_experts(model):
        parts = [found.pop(f"{group}.{part}", None) for part in ("gate_up_proj", "down_proj")]
        if parts[0] is not None and parts[1] is not None:
            separate = matrices(parts[0], parts[1])
            found |= {f"{group}.{name}.weight": tensor for name, tensor in separate.items()}
    expected = model._keys_to_ignore_on_load_unexpected or ()
    unplaced = [name for name in ignored if not any(re.search(p, name) for p in expected)]
    return Converted(found, sorted(unplaced))


def stored_tensors(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return what transformers would save of a model's tensors: those of `model_tensors`.

    Args:
        model: As transformers builds it, experts fused; on any device.
        tensors: By their names in the model with separate experts.
    """
    left: dict[str, Any] = dict(tensors)
    for group in fused_experts(model):
        experts = {n: left.pop(n) for n in tensors if n.startswith(f"{group}.")}
        if experts:
            gate_up, down = joined(
                {n.removeprefix(f"{group}.").removesuffix(".weight"): t for n, t in experts.items()}
            )
            left |= {f"{group}.gate_up_proj": gate_up, f"{group}.down_proj": down}
    published: dict[str, LazyTensor] = revert_weight_conversion(model, left)
    return published


def names_in_model(model: PreTrainedModel, prefix: str = "") -> dict[str, str]:
    """Return, by its name in a published checkpoint, what a tensor of the model is called in it.

    Tensors that a checkpoint holds in other pieces than the model are left out.

    Args:
        model: As transformers builds it, experts fused; on any device.
        prefix: Of the names that are asked for: all, or those of a block.
    """
    seen: list[str] = []

    def leaves(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
        return {n: LazyTensor(t.shape, t.dtype, partial(read, n, t)) for n, t in tensors.items()}

    def read(name: str, like: Tensor, index: Index) -> Tensor:
        seen.append(name)
        return torch.empty(like.shape, dtype=like.dtype, device="meta")[index]

    known = {n: t for n, t in model.state_dict().items() if n.startswith(prefix)}
    own = model_tensors(model, leaves(known)).tensors
    names: dict[str, str] = {}
    for stored, tensor in stored_tensors(model, leaves(own)).items():
        seen.clear()
        tensor.read()
        if len(seen) == 1 and own[seen[0]].shape == tensor.shape:
            names[stored] = seen[0]
    return names


def guard_name(model: PreTrainedModel, layers: Iterable[str]) -> str | None:
    """Return the name of a tensor without values that only llmpress passes over.

    To whoever knows nothing of compressed layers it is a weight of another shape: loading fails,
    where transformers would otherwise warn and go on with random weights. It has the name that
    published checkpoints give the weight, which all versions of transformers know.

    Args:
        model: As transformers builds it, experts fused; on any device.
        layers: Full names of the compressed layers; without any there is no guard.
    """
    first = min(layers, key=lambda name: (".experts." in name, name), default=None)
    if first is None:
        return None
    block = re.match(r".*?\.\d+\.", first)
    published = names_in_model(model, block[0] if block else "")
    group, inside, _ = first.partition(".experts.")
    fused = f"{group}.experts.down_proj" if inside else f"{first}.weight"  # as it is in the model
    return next((n for n, own in published.items() if own == f"{first}.weight"), fused)
