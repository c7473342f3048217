"""LoRA and QLoRA adapters as they are made: put beside a model's linears, trained, and stored."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpress.core.artifacts import save_tensors
from llmpress.core.errors import ConfigError
from llmpress.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    calm,
    keep_as_stored,
    required,
)
from llmpress.models.architectures import block_linears
from llmpress.models.checkpoints.compressed import is_compressed
from llmpress.models.checkpoints.files import Checkpoint, copy_companions, refuse_quantized
from llmpress.models.loading import load_model

STORED_DTYPE = torch.bfloat16
"""What adapters, and what is not quantized of an NF4 base, are stored in."""


def open_base(model: Path, *, quantize: bool, device: torch.device) -> PreTrainedModel:
    """Load a dense model to put adapters on, its linears as NF4 with ``quantize``.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        ConfigError: The model is compressed.
    """
    if is_compressed(Checkpoint(model)):
        raise ConfigError(f"{model}: is compressed; adapters are trained on its original")
    if not quantize:
        return load_model(model, device=str(device))
    refuse_quantized(model)
    required("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=settings,
        dtype=STORED_DTYPE,
        device_map={"": device},
        trust_remote_code=False,
        local_files_only=True,
    )
    keep_as_stored(quantized)
    quantized.eval()
    return quantized


def save_base(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Store an NF4 base inside an adapter folder."""
    model.save_pretrained(folder / BASE)
    copy_companions(source, folder / BASE)


def add_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Put an adapter beside every linear of the decoder blocks, in place.

    Args:
        model: What `open_base` returned; all else of it is frozen, and its tensors outside the
            quantized linears become fp32.
        rank: Of the adapters.
        alpha: The product of an adapter is scaled by ``alpha / rank``.
        seed: Of the factor that does not start at zero.

    Returns:
        The adapters' parameters by the names they are stored under.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    peft = required("peft")
    names = {name.rpartition(".")[2] for block in block_linears(model) for name in block}
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(names), task_type="CAUSAL_LM"
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():  # NF4 is stored as integers
            parameter.data = parameter.data.float()
    torch.manual_seed(seed)
    with calm():
        wrapped = peft.get_peft_model(model, settings)
    state = peft.get_peft_model_state_dict(wrapped)
    by_place = {p.data_ptr(): p for p in wrapped.parameters() if p.requires_grad}
    return {name: by_place[tensor.data_ptr()] for name, tensor in state.items()}


def save_adapter(
    tensors: Mapping[str, Tensor], folder: Path, *, model: str, rank: int, alpha: float
) -> None:
    """Write an adapter as peft would, without its random order of names."""
    peft = required("peft")
    modules = {name.removesuffix(".weight").split(".")[-2] for name in tensors}
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
        inference_mode=True,
    )
    content = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in settings.to_dict().items()
    }
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
