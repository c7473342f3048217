"""A compressed delta on top of its base model: put it there, take it off again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpress.core.artifacts import PROVENANCE, fingerprint, verify
from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import replace_module
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import delta_layer
from llmpress.models.checkpoints.files import empty_model
from llmpress.models.checkpoints.finetuned_config import changed_config, computed_changes
from llmpress.models.experts import SeparateExperts, separate_experts
from llmpress.models.loading import forbid_saving, load_model, loaded_dtype
from llmpress.models.quantizer import own_quantization
from llmpress.nn.layers import AdaptedLinear, CompressedLinear, keep_dense
from llmpress.nn.layers.base import frozen

CARRIED = "_llmpress_delta"


class Swap:
    """Attributes that are set for a while."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        old = getattr(owner, name)
        setattr(owner, name, value)
        self._old.append((owner, name, old))

    def undo(self) -> None:
        """Set everything back, the last first."""
        while self._old:
            setattr(*self._old.pop())


@dataclass
class ModelDelta:
    """A delta in memory, fitted to one model, which it leaves as it is until it is put on.

    Attributes:
        folder: Where it was read from.
        model: What it is fitted to: the model itself, or, where the fine-tuned model has another
            configuration, one of that configuration around the same tensors.
        computed: Entries of the configuration that change what the model computes.
        layers: By name, each linear that changes: the base's own with its delta.
        tensors: By name of their module, the tensors that replace the base's, by attribute.
        sizes: Attributes of modules and configurations that come with those: owner, name, value.
    """

    folder: Path
    model: PreTrainedModel
    computed: list[str]
    layers: dict[str, AdaptedLinear] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sizes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def put_on(self, model: PreTrainedModel, swap: Swap) -> None:
        """Turn the base into the fine-tuned model; ``swap`` turns it back."""
        if self.model is not model:
            config = self.model.config
            sizes = {k: v for k, v in vars(self.model).items() if k in config.to_dict()}
            for name, value in {**sizes, **self.model._modules, "config": config}.items():
                swap.set(model, name, value)
        for name, tensors in self.tensors.items():
            module = model.get_submodule(name)
            for attribute, tensor in tensors.items():
                swap.set(module, attribute, tensor)
        for owner, attribute, value in self.sizes:
            swap.set(owner, attribute, value)
        for name, adapted in self.layers.items():
            swap_module(model, name, adapted, swap)

    def check_in_place(self, model: PreTrainedModel) -> None:
        """Check that what was put on is still there.

        Raises:
            ArtifactError: A layer was replaced since.
        """
        for name, adapted in self.layers.items():
            if model.get_submodule(name) is not adapted:
                raise ArtifactError(
                    f"{name}: its delta was merged into it; load the base model again"
                )


@dataclass
class _Applied:
    """The delta that a model carries, and what it replaced."""

    delta: ModelDelta
    swap: Swap

    def __str__(self) -> str:
        return f"the delta {self.delta.folder}; remove it first"


def load_finetuned(
    base: Path | str,
    delta: Path | str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a base model and put a compressed delta on it.

    Args:
        base: The delta's base, plain or itself compressed.
        delta: What ``compress_delta`` wrote.
        dtype: Of everything that is not compressed, as `load_model` takes it.
        device: Where the model goes: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ArtifactError: Another base, or a damaged folder.
        ConfigError: No such device here.
    """
    model = load_model(base, dtype=dtype, device=device)
    return load_delta(model, delta, base_folder=Path(base))


def load_delta(
    model: PreTrainedModel, folder: Path | str, *, base_folder: Path | None = None
) -> PreTrainedModel:
    """Turn a base model, in place, into the fine-tuned one: its linears stay, the delta joins them.

    Linear layers become `AdaptedLinear`; tensors that are kept exactly replace the base's, which
    are put aside. A grown vocabulary resizes embeddings and head. Several deltas on one base at
    once: `DeltaBank`.

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
    check_bare(model, str(folder))
    delta = fitted_delta(model, folder, base_fingerprint(model, base_folder))
    swap = Swap()
    try:
        delta.put_on(model, swap)
    except BaseException:
        swap.undo()
        raise
    for adapted in delta.layers.values():
        adapted.keeps_sum = True
    setattr(model, CARRIED, _Applied(delta, swap))
    forbid_saving(model, f"carries {getattr(model, CARRIED)}")
    return model


def remove_delta(model: PreTrainedModel) -> PreTrainedModel:
    """Take a delta off again, in place: the model holds its base's own tensors afterwards.

    Raises:
        ArtifactError: The model carries none from `load_delta`, or it was merged into the weights.
    """
    applied = getattr(model, CARRIED, None)
    if not isinstance(applied, _Applied):
        raise ArtifactError(
            f"{type(model).__name__}: carries no delta that could be removed; load_delta loads one"
        )
    applied.delta.check_in_place(model)
    applied.swap.undo()
    delattr(model, CARRIED)
    apart = any(isinstance(module, SeparateExperts) for module in model.modules())
    if own_quantization(model.config) is not None or not apart:
        del model.save_pretrained
    return model


def check_bare(model: PreTrainedModel, newcomer: str) -> None:
    """Check that a model carries no deltas yet.

    Raises:
        ArtifactError: It does.
    """
    carried = getattr(model, CARRIED, None)
    if carried is not None:
        raise ArtifactError(f"{newcomer}: the model already carries {carried}")


def swap_module(model: nn.Module, name: str, module: nn.Module, swap: Swap) -> None:
    """Put ``module`` in the place of the submodule called ``name`` for a while."""
    parent, _, child = name.rpartition(".")
    swap.set(model.get_submodule(parent), child, module)


def base_fingerprint(
    model: PreTrainedModel, base_folder: Path | None = None
) -> tuple[Path, str] | None:
    """Return the folder that a base was loaded from and its fingerprint.

    Args:
        model: The base.
        base_folder: The folder; by default what the model says of itself.

    Returns:
        None for a model that was built in memory or fetched from a hub: there is nothing to compare
        a delta with.
    """
    folder = base_folder or Path(getattr(model, "name_or_path", "") or "")
    if base_folder is None and not (folder.name and (folder / "config.json").is_file()):
        return None
    return folder, fingerprint(folder)


def fitted_delta(model: PreTrainedModel, folder: Path, base: tuple[Path, str] | None) -> ModelDelta:
    """Read and verify a delta and fit it to a model, which stays as it is.

    Only a mixture's fused experts are taken apart, into one linear layer per matrix.

    Args:
        model: The base model without a delta.
        folder: What ``compress_delta`` wrote.
        base: What `base_fingerprint` says of the model.

    Returns:
        The delta with tensors of its own in memory; nothing of the folder is needed any more.

    Raises:
        ArtifactError: Another base, or a damaged folder.
    """
    if (folder / PROVENANCE).is_file():
        verify(folder)
    stored = DeltaFolder(folder, "compressed_delta")
    _check_base(stored, base)
    separate_experts(model)
    changed = _around(model, stored) if stored.config else model
    delta = ModelDelta(folder, changed, computed_changes(stored.config))
    for name in stored.layers:
        linear = _base_linear(changed, name, stored)
        delta.layers[name] = AdaptedLinear(linear, delta_layer(name, stored, _device(linear)))
    for name in stored.exact_names():
        _add_exact(delta, name, stored)
    _add_tie(changed, stored, delta)
    _check_complete(delta)
    keep_dense(changed, (adapted.delta for adapted in delta.layers.values()))
    return delta


def _around(model: PreTrainedModel, stored: DeltaFolder) -> PreTrainedModel:
    """Return a model of the fine-tuned model's configuration that shares the base's tensors.

    Parameters that the base does not have, or not of this shape, stay on the meta device, in the
    dtype that transformers loads them in.
    """
    config = changed_config(model.config, stored.config)
    config.dtype = model.dtype
    changed = empty_model(config, stored.folder)
    if type(changed) is not type(model):
        raise ArtifactError(
            f"{stored.folder}: changes the configuration of a {type(changed).__name__}, the model "
            f"is a {type(model).__name__}; load the base with load_model"
        )
    modules = dict(changed.named_modules())
    for name, module in model.named_modules():
        is_plain = type(module) is nn.Linear  # packed weights stay in the modules that know them
        if type(modules.get(name)) is nn.Linear and not is_plain:
            replace_module(changed, name, module)
    modules, on = dict(changed.named_modules()), next(model.parameters()).device
    for module in modules.values():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(on)
    places = changed.state_dict()
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, place in places.items():
        own, (owner, _, attribute) = tensors.get(name), name.rpartition(".")
        if own is not None and own.shape == place.shape:
            setattr(modules[owner], attribute, own)
        elif place.is_floating_point():
            getattr(modules[owner], attribute).data = place.to(loaded_dtype(changed, name, place))
    changed.train(model.training)
    return changed


def _check_complete(delta: ModelDelta) -> None:
    for name, parameter in delta.model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        own = delta.tensors.get(owner, {}).get(attribute, parameter)
        if own.is_meta:
            raise ArtifactError(
                f"{delta.folder}: neither base nor delta hold the tensor {name}; extract it again"
            )


def _check_base(stored: DeltaFolder, base: tuple[Path, str] | None) -> None:
    needed = stored.header["base"]
    if base is not None and base[1] != needed["fingerprint"]:
        raise ArtifactError(
            f"{stored.folder}: made on base {needed['name']} ({needed['fingerprint'][:12]}), but "
            f"{base[0]} is another model ({base[1][:12]}); load the delta's own base"
        )


def _base_linear(
    model: PreTrainedModel, name: str, stored: DeltaFolder
) -> nn.Linear | CompressedLinear:
    """Return the linear layer of the model that a layer of the delta belongs to."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear | CompressedLinear):
        raise ArtifactError(f"{stored.folder}: the model has no linear layer {name}")
    have, need = [linear.out_features, linear.in_features], stored.layers[name]["shape"]
    if have != need:
        raise ArtifactError(
            f"{stored.folder}: {name} is {need} in the delta and {have} in the model"
        )
    return linear


def _add_exact(delta: ModelDelta, name: str, stored: DeltaFolder) -> None:
    """Add a fine-tuned tensor for the place of the base's, or for where the base has none."""
    model = delta.model
    owner, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
    except AttributeError:
        raise ArtifactError(
            f"{stored.folder}: the model has no place for the tensor {name}"
        ) from None
    like = next(p for p in model.parameters() if not p.is_meta)
    dtype = like.dtype if old is None else old.dtype
    if old is not None and old.is_meta:  # the base has none
        old = None
    tensor = stored.exact(name, None if old is None else old.detach())
    new = tensor.to(device=like.device if old is None else old.device, dtype=dtype, copy=True)
    is_buffer = attribute in dict(module.named_buffers(recurse=False))
    delta.tensors.setdefault(owner, {})[attribute] = new if is_buffer else frozen(new)
    if old is not None and old.shape != new.shape:
        _add_sizes(model, module, name, len(new), delta)


def _add_sizes(
    model: PreTrainedModel, module: nn.Module, name: str, rows: int, delta: ModelDelta
) -> None:
    """Let embeddings and head know their new number of rows.

    Raises:
        ArtifactError: A tensor of another shape that belongs to neither.
    """
    kinds = {"num_embeddings": nn.Embedding, "out_features": nn.Linear}
    attribute = next((a for a, kind in kinds.items() if isinstance(module, kind)), None)
    if attribute is None or module not in _vocabulary_layers(model):
        raise ArtifactError(f"{delta.folder}: {name} has another shape than in the model")
    delta.sizes.append((module, attribute, rows))
    for owner in (model.config.get_text_config(), model, model.base_model):
        if hasattr(owner, "vocab_size"):
            delta.sizes.append((owner, "vocab_size", rows))


def _add_tie(model: PreTrainedModel, stored: DeltaFolder, delta: ModelDelta) -> None:
    """Share embeddings and head exactly where the fine-tuned model does."""
    tied = bool(stored.header["tie_word_embeddings"])
    delta.sizes.append((model.config, "tie_word_embeddings", tied))
    embeddings, head = _vocabulary_layers(model)
    if not tied or head is None:
        return
    names = {module: name for name, module in model.named_modules()}
    weight = delta.tensors.get(names[embeddings], {}).get("weight", embeddings.weight)
    own = delta.tensors.get(names[head], {}).get("weight", head.weight)
    if own is not weight:
        delta.tensors.setdefault(names[head], {})["weight"] = weight
        delta.sizes.append((head, "out_features", len(weight)))


def _vocabulary_layers(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the embeddings and the head, None where there is none."""
    layers: Any = model
    return layers.get_input_embeddings(), layers.get_output_embeddings()


def _device(module: nn.Module) -> torch.device:
    stored: dict[str, Tensor] = module.state_dict()
    return next(iter(stored.values())).device
