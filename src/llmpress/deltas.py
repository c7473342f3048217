"""A compressed delta on top of its base model: put it there, take it off again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpress.architectures import replace_module
from llmpress.artifacts import PROVENANCE, fingerprint, verify
from llmpress.delta_files import EXACT, DeltaFolder
from llmpress.errors import ArtifactError
from llmpress.experts import separate_experts
from llmpress.layers import AdaptedLinear, CompressedLinear, filled_layer

APPLIED = "_llmpress_delta"


@dataclass
class _Applied:
    """What a delta replaced, so that it can be taken off."""

    folder: Path
    adapted: list[str] = field(default_factory=list)
    parameters: list[tuple[nn.Module, str, Tensor | None]] = field(default_factory=list)
    sizes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def set_size(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute and remember what it was."""
        self.sizes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def load_delta(
    model: PreTrainedModel, folder: Path | str, *, base_folder: Path | None = None
) -> PreTrainedModel:
    """Turn a base model, in place, into the fine-tuned one: its linears stay, the delta joins them.

    Linear layers become `AdaptedLinear`; tensors that are kept exactly replace the base's, which
    are put aside. A grown vocabulary resizes embeddings and head.

    Args:
        model: The base model, dense or itself compressed.
        folder: What ``compress_delta`` wrote.
        base_folder: Where the base was loaded from, to compare fingerprints; by default what the
            model says of itself, when that is a local folder.

    Returns:
        The same model.

    Raises:
        ArtifactError: Another base, a model that already carries a delta, or a damaged folder.
    """
    folder = Path(folder)
    if getattr(model, APPLIED, None) is not None:
        applied = getattr(model, APPLIED).folder
        raise ArtifactError(
            f"{folder}: the model already carries the delta {applied}; remove it first"
        )
    if (folder / PROVENANCE).is_file():
        verify(folder)
    delta = DeltaFolder(folder, "compressed_delta")
    _check_base(model, delta, base_folder)
    separate_experts(model)
    layers = {name: _build(name, entry, delta) for name, entry in delta.header["layers"].items()}
    _check_layers(model, layers, delta)
    applied = _Applied(folder)
    setattr(model, APPLIED, applied)
    try:
        for name in delta.exact_names():
            _set_exact(model, name, delta.tensor(EXACT + name), applied)
        _set_tie(model, delta, applied)
        for name, layer in layers.items():
            base = model.get_submodule(name)
            replace_module(model, name, AdaptedLinear(base, layer.to(_device(base))))
            applied.adapted.append(name)
    except BaseException:
        remove_delta(model)
        raise
    return model


def remove_delta(model: PreTrainedModel) -> PreTrainedModel:
    """Take a delta off again, in place: the model holds its base's own tensors afterwards.

    Raises:
        ArtifactError: The model carries none, or it was merged into the weights.
    """
    applied = getattr(model, APPLIED, None)
    if applied is None:
        raise ArtifactError(f"{type(model).__name__}: carries no delta that could be removed")
    bases: dict[str, nn.Module] = {}
    for name in applied.adapted:
        adapted = model.get_submodule(name)
        if not isinstance(adapted, AdaptedLinear):
            raise ArtifactError(f"{name}: its delta was merged into it; load the base model again")
        bases[name] = adapted.base
    for name, base in bases.items():
        replace_module(model, name, base)
    for module, name, parameter in reversed(applied.parameters):
        setattr(module, name, parameter)
    for owner, name, value in reversed(applied.sizes):
        setattr(owner, name, value)
    delattr(model, APPLIED)
    return model


def _check_base(model: PreTrainedModel, delta: DeltaFolder, base_folder: Path | None) -> None:
    folder = base_folder or Path(getattr(model, "name_or_path", "") or "")
    if base_folder is None and not (folder.name and (folder / "config.json").is_file()):
        return  # built in memory or fetched from a hub: there is nothing to compare
    found, needed = fingerprint(folder), delta.header["base"]
    if found != needed["fingerprint"]:
        raise ArtifactError(
            f"{delta.folder}: made on base {needed['name']} ({needed['fingerprint'][:12]}), but "
            f"{folder} is another model ({found[:12]}); load the delta's own base"
        )


def _build(name: str, entry: dict[str, Any], delta: DeltaFolder) -> CompressedLinear:
    out_features, in_features = entry["shape"]
    try:
        return filled_layer(entry, in_features, out_features, delta.tensors(f"{name}."))
    except ValueError as error:
        raise ArtifactError(f"{delta.folder}: layer {name} is damaged: {error}") from None


def _check_layers(
    model: PreTrainedModel, layers: dict[str, CompressedLinear], delta: DeltaFolder
) -> None:
    for name, layer in layers.items():
        try:
            base = model.get_submodule(name)
        except AttributeError:
            base = None
        if not isinstance(base, nn.Linear | CompressedLinear):
            raise ArtifactError(f"{delta.folder}: the model has no linear layer {name}")
        have, need = (base.out_features, base.in_features), (layer.out_features, layer.in_features)
        if have != need:
            raise ArtifactError(
                f"{delta.folder}: {name} is {list(need)} in the delta and {list(have)} in the model"
            )


def _set_exact(model: PreTrainedModel, name: str, tensor: Tensor, applied: _Applied) -> None:
    """Put a fine-tuned tensor in the place of the base's, or where the base has none."""
    owner, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
    except AttributeError:
        raise ArtifactError(
            f"{applied.folder}: the model has no place for the tensor {name}"
        ) from None
    like = old if old is not None else next(model.parameters())
    new = tensor.to(device=like.device, dtype=like.dtype)
    is_buffer = attribute in dict(module.named_buffers(recurse=False))
    applied.parameters.append((module, attribute, old))
    setattr(module, attribute, new if is_buffer else nn.Parameter(new, requires_grad=False))
    if old is not None and old.shape != new.shape:
        _resize(model, module, name, new, applied)


def _resize(
    model: PreTrainedModel, module: nn.Module, name: str, new: Tensor, applied: _Applied
) -> None:
    """Let embeddings and head know their new number of rows.

    Raises:
        ArtifactError: A tensor of another shape that belongs to neither.
    """
    rows = {"num_embeddings": nn.Embedding, "out_features": nn.Linear}
    attribute = next((a for a, kind in rows.items() if isinstance(module, kind)), None)
    if attribute is None or module not in _vocabulary_layers(model):
        raise ArtifactError(f"{applied.folder}: {name} has another shape than in the model")
    applied.set_size(module, attribute, new.shape[0])
    for owner in (model.config.get_text_config(), model, model.base_model):
        if hasattr(owner, "vocab_size"):
            applied.set_size(owner, "vocab_size", new.shape[0])


def _set_tie(model: PreTrainedModel, delta: DeltaFolder, applied: _Applied) -> None:
    """Share embeddings and head exactly where the fine-tuned model does."""
    tied = bool(delta.header["tie_word_embeddings"])
    embeddings, head = _vocabulary_layers(model)
    applied.set_size(model.config, "tie_word_embeddings", tied)
    if tied and head is not None and head.weight is not embeddings.weight:
        applied.parameters.append((head, "weight", head.weight))
        applied.set_size(head, "out_features", embeddings.weight.shape[0])
        head.weight = embeddings.weight


def _vocabulary_layers(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the embeddings and the head, None where there is none."""
    layers: Any = model
    return layers.get_input_embeddings(), layers.get_output_embeddings()


def _device(module: nn.Module) -> torch.device:
    stored: dict[str, Tensor] = module.state_dict()
    return next(iter(stored.values())).device
