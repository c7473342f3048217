"""Compressed checkpoints as transformers sees them.

Importing this module registers the quantization method ``llmpress`` with transformers by its public
registries; from then on ``AutoModelForCausalLM.from_pretrained`` opens compressed folders. Layers
are put in place on the meta device, so that no dense weight ever exists.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmpress.architectures import replace_module
from llmpress.checkpoints import Checkpoint
from llmpress.errors import ArtifactError
from llmpress.layers import AdaptedLinear, CompressedLinear, build_layer

QUANT_METHOD = "llmpress"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class LLMPressConfig(QuantizationConfigMixin):
    """What config.json says under ``quantization_config``.

    Args:
        layers: For each compressed layer, by full name: its ``kind`` and ``spec``.
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
    """Puts empty compressed layers in place before transformers loads the stored tensors."""

    requires_calibration = True  # only checkpoints that are already compressed are loaded
    quantization_config: LLMPressConfig

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse artifacts of a format this version does not know."""
        check_format(self.quantization_config.format_version)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        insert_layers(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Compressed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codebooks, factors and scales can be finetuned."""
        return True


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
        layers: ``{"kind": ..., "spec": {...}}`` by full name.

    Raises:
        ArtifactError: The model has no linear layer of a name.
    """
    for name, entry in layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ArtifactError(
                f"{name}: compressed in the artifact, but the model has no such linear"
            )
        with torch.device("meta"):
            layer = build_layer(
                entry["kind"],
                linear.in_features,
                linear.out_features,
                dict(entry["spec"]),
                bias=linear.bias is not None,
            )
        replace_module(model, name, layer)


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was written by llmpress."""
    return bool(compressed_layers(checkpoint))


def compressed_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return kind and spec of each compressed layer of a checkpoint, none for a plain one."""
    quantization = getattr(checkpoint.config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization.get("quant_method") != QUANT_METHOD:
        return {}
    check_format(quantization.get("format_version", 0))
    return dict(quantization["layers"])


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build a plain or compressed model with parameters on the meta device, nothing read."""
    model = checkpoint.skeleton()
    insert_layers(model, compressed_layers(checkpoint))
    return model


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a plain or a compressed model.

    Args:
        folder: A Hugging Face folder, or one that ``compress`` or ``finetune`` wrote.
        dtype: What floats are converted to; packed integers stay as they are.
        device: Where the model goes.

    Raises:
        ArtifactError: The folder holds no model, or a damaged one.
    """
    Checkpoint(folder)  # names a missing or damaged file before transformers does
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    model.to(torch.device(device))  # type: ignore[arg-type]  # a decorator hides the signature
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ArtifactError: The folder holds none.
    """
    if not any(folder.glob("tokenizer*")):
        raise ArtifactError(f"{folder}: no tokenizer here; fetch or compress the model again")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every compressed layer, in place, by a dense one with the weight it stands for.

    An adapted layer (base and delta) becomes one dense layer with the sum of both.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            replace_module(model, name, _dense_sum(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace_module(model, name, _dense(module.dequantize(), module.bias, model.dtype))
    return model


def _dense(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def _dense_sum(adapted: AdaptedLinear) -> nn.Linear:
    base, delta = adapted.base, adapted.delta.dequantize()
    if isinstance(base, CompressedLinear):
        return _dense(base.dequantize() + delta, base.bias, delta.dtype)
    if not isinstance(base, nn.Linear):
        raise ArtifactError(f"a delta lies on a {type(base).__name__}, which has no weight")
    return _dense(base.weight.float() + delta, base.bias, base.weight.dtype)
