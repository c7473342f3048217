"""LoRA adapters beside a dense model, and beside its 4-bit NF4 form (QLoRA): what others do.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes
them. QLoRA's also holds ``base/``, the model with its linears in NF4 as bitsandbytes stores them,
double quantization included. peft and bitsandbytes are needed for these alone and imported late.
"""

import copy
import importlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpress.core.artifacts import folder_bytes, read_json
from llmpress.core.devices import pick_device
from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import block_linears, replace_module
from llmpress.models.checkpoints.files import Checkpoint, linear_bits
from llmpress.models.loading import load_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"

# bitsandbytes says at its import that it has no kernel of its own for this processor
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def load_adapted(
    folder: Path, original: Path, *, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a model with its adapter beside it, as it is stored.

    Args:
        folder: An adapter folder.
        original: The model the adapter was trained on; not read where the folder holds a base.
        dtype: Of all that is not quantized.
        device: Where it goes.

    Raises:
        ModuleNotFoundError: peft or bitsandbytes is not installed.
        ArtifactError: No adapter there.
    """
    if not is_adapter(folder):
        raise ArtifactError(f"{folder}: no adapter here ({ADAPTER_CONFIG} is missing)")
    peft = required("peft")
    model: PreTrainedModel
    if (folder / BASE).is_dir():
        required("bitsandbytes")
        model = AutoModelForCausalLM.from_pretrained(
            folder / BASE,
            dtype=dtype,
            device_map={"": pick_device(device)},
            trust_remote_code=False,
            local_files_only=True,
        )
        keep_as_stored(model)
    else:
        model = load_model(original, dtype=dtype, device=device)
    with calm():
        try:
            wrapped = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{folder}: peft cannot put it on {original} ({reason}); name its own base, or "
                "extract the adapter's delta"
            ) from None
    for parameter in wrapped.parameters():
        if parameter.is_floating_point():  # NF4 is stored as integers
            parameter.data = parameter.data.to(dtype)
    inner: PreTrainedModel = wrapped.base_model.model
    inner.eval()
    return inner


@torch.no_grad()
def merged(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every adapted layer, in place, by a dense one of what both compute."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            adapted: Any = module
            base: Any = module.get_base_layer()
            if isinstance(base, nn.Embedding):  # a head may share its weight
                (adapter,) = adapted.lora_embedding_A
                weight = base.weight.float() + adapted.get_delta_weight(adapter).float()
                alone = copy.copy(base)
                alone._parameters = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
                replace_module(model, name, alone)
                continue
            if adapted.lora_variant:  # DoRA and the like: peft knows what they compute
                adapted.merge()
                replace_module(model, name, base)
                continue
            (adapter,) = adapted.lora_A
            A = adapted.lora_A[adapter].weight.float()  # [rank, in]
            B = adapted.lora_B[adapter].weight.float()  # [out, rank]
            weight = _dense(base) + adapted.scaling[adapter] * (B @ A)
            out_features, in_features = weight.shape
            has_bias = base.bias is not None
            linear = nn.Linear(in_features, out_features, bias=has_bias, device="meta")
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if has_bias:
                linear.bias = nn.Parameter(base.bias.to(dtype), requires_grad=False)
            replace_module(model, name, linear)
    for flag in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, flag):  # nothing is quantized any more: it may change its dtype
            setattr(model, flag, False if flag.startswith("is_") else None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def adapter_sizes(folder: Path, original: Path) -> dict[str, int]:
    """Count what an adapter and the model it needs take.

    Returns:
        ``linear_weights`` and ``linear_bits``: weights of the decoder blocks' linears, and the bits
        stored for them, adapters included; ``model_weights``; ``model_bytes`` of all weight files
        that have to be there.
    """
    checkpoint = Checkpoint(original)
    names = [name for block in block_linears(checkpoint.skeleton()) for name in block]
    weights = sum(math.prod(checkpoint.shape(f"{name}.weight")) for name in names)
    adapter = sum(_bytes(tensor) for tensor in load_file(folder / ADAPTER_WEIGHTS).values())
    if (folder / BASE).is_dir():
        prefixes = tuple(f"{name}.weight" for name in names)
        stored = {
            name: tensor
            for file in (folder / BASE).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        linear = sum(_bytes(tensor) for name, tensor in stored.items() if name.startswith(prefixes))
    else:
        linear = linear_bits(checkpoint)[1] // 8
    base = folder / BASE if (folder / BASE).is_dir() else original
    return {
        "linear_weights": weights,
        "linear_bits": 8 * (linear + adapter),
        "model_weights": sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
        "model_bytes": folder_bytes(folder) + folder_bytes(base),
    }


def base_name(folder: Path) -> str:
    """Return the name of the model an adapter was trained on."""
    name: str = read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
    return name


def required(package: str) -> Any:
    """Import a package of the extra ``adapters``.

    Raises:
        ModuleNotFoundError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"package {package} is not installed: pip install 'llmpress[adapters]'", name=package
        ) from None


def keep_as_stored(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rewriting weights for some processors, with coarser scales."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - mypy knows no such


@contextmanager
def calm() -> Iterator[None]:
    """Hide peft's use of what transformers renames: no user can act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _dense(base: nn.Module) -> Tensor:
    weight: Any = base.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dense.float()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
