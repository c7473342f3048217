"""Open plain and compressed models and their tokenizers through transformers."""

import re
from functools import partial
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

from llmpress.core.artifacts import PROVENANCE, verify
from llmpress.core.companions import TOKENIZERS
from llmpress.core.devices import pick_device
from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import replace_module
from llmpress.models.checkpoints.compressed import compressed_layers
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.folders import model_folder
from llmpress.models.quantizer import insert_layers
from llmpress.nn.layers import AdaptedLinear, CompressedLinear


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build a plain or compressed model with parameters on the meta device, nothing read."""
    model = checkpoint.skeleton()
    insert_layers(model, compressed_layers(checkpoint))
    return model


def check_complete(checkpoint: Checkpoint, model: PreTrainedModel | None = None) -> None:
    """Check by names and shapes that a model can be opened; no tensor is read.

    Args:
        checkpoint: The model.
        model: Its `skeleton`, where that is at hand.

    Raises:
        ArtifactError: A tensor is missing or of another shape.
    """
    model, names = model or skeleton(checkpoint), set(checkpoint.names())
    known: Any = model
    optional = "|".join(known._keys_to_ignore_on_load_missing or ()) or "$^"
    tied = known.all_tied_weights_keys or {}
    for name, place in sorted(model.state_dict().items()):
        if name not in names:
            if name not in tied and not re.search(optional, name):
                raise ArtifactError(
                    f"{checkpoint.folder}: holds no tensor {name!r}; fetch the model again"
                )
        elif (found := checkpoint.shape(name)) != tuple(place.shape):
            raise ArtifactError(
                f"{checkpoint.folder}: {name} is {list(found)}, its configuration needs "
                f"{list(place.shape)}; fetch the model again"
            )


def load_model(
    folder: Path | str, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a plain or a compressed model, verified against its provenance where it has one.

    Args:
        folder: A Hugging Face folder, or one that ``compress`` or ``finetune`` wrote.
        dtype: Of everything that is not compressed, ``auto`` for what it is stored in; compressed
            layers keep the dtype they are stored in and compute in that of their input.
        device: Where the model goes: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ArtifactError: The folder holds no model, or a damaged one.
        ConfigError: No such device here.
    """
    place, folder = pick_device(device), model_folder(folder)
    if (folder / PROVENANCE).is_file():
        verify(folder)
    checkpoint = Checkpoint(folder)  # names what is missing or damaged before transformers does
    opens: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    if checkpoint.quantization:  # by somebody else: transformers is given the weights
        opens = type(checkpoint.skeleton())
        source = {"pretrained_model_name_or_path": None, "state_dict": checkpoint.read()}
        source["config"] = checkpoint.config
    opened: Any = opens.from_pretrained(
        **source,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # named below, as missing tensors are
        output_loading_info=True,
    )
    model: PreTrainedModel = opened[0]
    loaded: dict[str, Any] = opened[1]
    for name, found, needed in sorted(loaded["mismatched_keys"]):
        raise ArtifactError(
            f"{folder}: {name} is {list(found)}, its configuration needs {list(needed)}; "
            "fetch the model again"
        )
    if loaded["missing_keys"]:
        name = min(loaded["missing_keys"])
        raise ArtifactError(f"{folder}: holds no tensor {name!r}; fetch the model again")
    model.name_or_path = str(folder)
    model.to(place)  # type: ignore[arg-type]  # a decorator hides the signature
    model.eval()
    return model


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ArtifactError: The folder holds none, or a damaged one.
    """
    folder = Path(folder)
    if (folder / PROVENANCE).is_file():
        verify(folder)
    if not any(file.is_file() for pattern in TOKENIZERS for file in folder.glob(pattern)):
        model_folder(folder)  # which says what else is wrong
        raise ArtifactError(f"{folder}: no tokenizer here; fetch or compress the model again")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ArtifactError(f"{folder}: its tokenizer cannot be read ({reason})") from None
    return tokenizer


def loaded_dtype(model: PreTrainedModel, name: str, place: torch.Tensor) -> torch.dtype:
    """Return what transformers loads a tensor in, which for some is fp32 whatever is asked for.

    Args:
        model: Built in the dtype that is asked for.
        name: Of the tensor in the model.
        place: The tensor there.
    """
    known: Any = model
    plan: dict[str, torch.dtype] = known._get_dtype_plan(model.config.dtype)
    kept = (dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name))
    return next(kept, place.dtype)


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every compressed layer, in place, by a dense one with the weight it stands for.

    An adapted layer (base and delta) becomes one dense layer with the sum of both. The model is
    for computing: `export_dense` writes it.
    """
    forbid_saving(model, "its weights were dequantized in memory")
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            replace_module(model, name, _dense_sum(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace_module(model, name, _dense(module.dequantize(), module.bias, model.dtype))
    return model


def forbid_saving(model: PreTrainedModel, reason: str) -> None:
    """Let ``save_pretrained`` raise: what it wrote would be opened as another model."""
    model.save_pretrained = partial(_refuse_saving, reason)  # type: ignore[method-assign]


def _refuse_saving(reason: str, *_: Any, **__: Any) -> None:
    raise ArtifactError(f"the model: {reason}; `llmpress export --dense` writes it as a plain one")


def _dense(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def _dense_sum(adapted: AdaptedLinear) -> nn.Linear:
    base = adapted.base
    try:
        weight = adapted.dequantize()
    except TypeError as error:
        raise ArtifactError(str(error)) from None
    dtype = base.weight.dtype if isinstance(base, nn.Linear) else weight.dtype
    return _dense(weight, adapted.bias, dtype)
