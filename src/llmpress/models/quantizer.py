"""The quantization method ``llmpress`` in transformers' public registries.

Layers are put in place on the meta device before transformers reads any weight, so that no dense
weight ever exists. This module is imported while transformers is still importing itself: nothing
here may need more of transformers than its registry.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmpress.core.artifacts import PROVENANCE, verify
from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import compressed_linear, replace_module
from llmpress.models.experts import separate_experts
from llmpress.nn.layers import build_layer, keep_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

QUANT_METHOD = "llmpress"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class LLMPressConfig(QuantizationConfigMixin):
    """What config.json says under ``quantization_config``.

    Args:
        layers: For each compressed layer, by full name: its `llmpress.nn.layers.layer_entry`.
        format_version: Version of the artifact format.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = 1,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers lists its own only
        self.format_version = format_version
        self.layers = dict(layers or {})


@register_quantizer(QUANT_METHOD)
class LLMPressQuantizer(HfQuantizer):
    """Puts empty compressed layers in place before transformers loads the stored tensors.

    Whatever the ``dtype`` asked for, the tensors of compressed layers stay in the dtype they are
    stored in, so that saving a loaded model again gives the same bytes.
    """

    requires_calibration = True  # only checkpoints that are already compressed are loaded
    quantization_config: LLMPressConfig
    _guards: Sequence[str] = ()

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse artifacts of a format this version does not know."""
        check_format(self.quantization_config.format_version)

    def _process_model_before_weight_loading(
        self,
        model: "PreTrainedModel",
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        if checkpoint_files:
            _verify_before_reading(model, [Path(file) for file in checkpoint_files])
        separate_experts(model)
        layers = self._layers_in(model)
        insert_layers(model, layers)
        _forbid_initialisation(model, layers)
        prefix = f"{model.base_model_prefix}."
        self._guards = [name.removeprefix(prefix) for name in _guards(checkpoint_files or ())]
        known = model._keys_to_ignore_on_load_unexpected or ()
        guards = {rf"(^|\.){re.escape(name)}$" for name in self._guards}
        model._keys_to_ignore_on_load_unexpected = {*known, *guards}

    def _layers_in(self, model: "PreTrainedModel") -> dict[str, Mapping[str, Any]]:
        """Return the layers by their names in a model, which one without a head cuts short."""
        cut = f"{model.base_model_prefix}." if model.base_model is model else ""
        layers = self.quantization_config.layers
        return {name.removeprefix(cut): entry for name, entry in layers.items()}

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **_: Any
    ) -> "PreTrainedModel":
        keep_dense(model)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: "PreTrainedModel") -> Any:
        """Tensors have the names of the model's parameters: nothing is renamed or fused."""
        del weight_conversions, model
        return []

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[Any, dict[str, Any]]:
        """Return what is saved: the model's tensors and the guard that it was loaded with."""
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        guards = {prefix + name: torch.empty(0, dtype=torch.uint8) for name in self._guards}
        return {**model.state_dict(), **guards}, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Compressed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codebooks, factors and scales can be finetuned."""
        return True


def own_quantization(config: Any) -> dict[str, Any] | None:
    """Return what a model's configuration says of compression, None of a model not from here."""
    found = getattr(config, "quantization_config", None) or {}
    if not isinstance(found, dict):
        found = found.to_dict()
    return found if found.get("quant_method") == QUANT_METHOD else None


def is_guard(shape: Sequence[int]) -> bool:
    """Whether a stored tensor of this shape is none, but keeps others from opening the model."""
    return tuple(shape) == (0,)


def _guards(files: Iterable[str | Path]) -> list[str]:
    """Return the names of the tensors in these files that only llmpress passes over."""
    found = []
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = shard.keys()
            found += [name for name in names if is_guard(shard.get_slice(name).get_shape())]
    return found


def check_format(version: int) -> None:
    """Raise `ArtifactError` for an artifact of another format version."""
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"artifact of format version {version}; this llmpress reads version {FORMAT_VERSION}: "
            "compress again, or install the version that wrote it"
        )


def insert_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace linears by empty compressed layers on the meta device.

    Args:
        model: Has an ``nn.Linear`` under each of the names.
        layers: What `llmpress.nn.layers.layer_entry` says of each, by full name.

    Raises:
        ArtifactError: The model has no linear layer of a name, or the entry is damaged.
    """
    for name, entry in layers.items():
        linear = compressed_linear(name, model)
        shape = (linear.in_features, linear.out_features)
        try:
            layer = build_layer(entry, *shape, bias=linear.bias is not None)
        except ValueError as error:
            raise ArtifactError(
                f"config.json: layer {name} is damaged: {error}; compress again"
            ) from None
        replace_module(model, name, layer)


def _forbid_initialisation(model: nn.Module, names: Iterable[str]) -> None:
    """Tell transformers that modules with compressed layers need no first weights.

    Some, such as Mamba's mixer, would otherwise write them into layers that have no weight.
    """
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if next(module.buffers(recurse=False), None) is None:  # buffers may be in no file
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own flag


def _verify_before_reading(model: "PreTrainedModel", files: list[Path]) -> None:
    """Refuse damaged weights or configuration, in a local folder and in the hub's cache.

    A model that transformers saved again has no provenance and is opened as any other model is.
    """
    folder = files[0].parent
    if (folder / PROVENANCE).is_file():
        verify(folder, files)
    elif not Path(name := model.name_or_path or "").is_dir():
        if _fetch_provenance(name, getattr(model.config, "_commit_hash", None)) is None:
            logger.warning("%s: has no %s, so it is not verified", name, PROVENANCE)
        else:
            verify(folder, files, complete=False)


def _fetch_provenance(repository: str, commit: str | None) -> str | None:
    """Bring the provenance of a hub repository beside the files that transformers downloaded."""
    from transformers.utils.hub import cached_file

    return cached_file(
        repository,
        PROVENANCE,
        revision=commit,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
