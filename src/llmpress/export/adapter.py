"""Write the low-rank part of a compressed delta as a LoRA adapter that peft loads."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.core.artifacts import artifact_folder, claim, save_tensors, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.progress import progress
from llmpress.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmpress.models.checkpoints.adapter_view import FACTORS, PREFIX
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import delta_layer
from llmpress.models.checkpoints.finetuned_config import computed_changes
from llmpress.models.experts import expert_matrix

logger = logging.getLogger(__name__)


def export_adapter(
    delta: Path | str,
    *,
    out: Path | str,
    base_name: str | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    force: bool = False,
) -> Path:
    """Write a compressed delta of low-rank layers as a folder for ``PeftModel.from_pretrained``.

    All layers get one rank, that of the largest, with zeros behind what they have: llama.cpp scales
    every layer by one alpha over the layer's own rank. The scaling is 1. Layers of rank 0 are left
    out. What ``max_rank`` loses is logged and stands in provenance.json.

    Tensors that the delta keeps exactly have no place in a LoRA adapter: they are named in a
    warning and, as ``not_in_the_adapter``, among the settings in provenance.json.

    Args:
        delta: A compressed delta, by a method that stores factors (svd, delta_come).
        out: Folder to write: adapter_config.json and adapter_model.safetensors.
        base_name: What adapter_config.json calls the base; by default the delta's name of it.
        max_rank: What the reader takes at most (vLLM: 512); layers of a larger rank keep their
            largest singular values. By default every layer is written whole.
        dtype: What the factors are stored in.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: No compressed delta, a damaged one, a layer that is no product of factors, or
            ``out`` exists.
        ConfigError: Another dtype than bfloat16, float16 and float32, or ``max_rank`` below 1.
    """
    out, dtype = Path(out), pick_dtype(dtype)
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank: must be at least 1, got {max_rank}")
    opened = DeltaFolder(Path(delta), "compressed_delta")
    if changed := computed_changes(opened.config):
        raise ArtifactError(
            f"{opened.folder}: the fine-tuned model's {', '.join(changed)} differ from its base's, "
            "which no adapter holds; write the delta dense"
        )
    left_out = opened.exact_names()
    settings: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "form": "adapter",
        "max_rank": max_rank,
        "not_in_the_adapter": left_out,
    }
    inputs = {"delta": opened.folder}
    with (
        claim(out, force=force, inputs=inputs.values()) as target,
        artifact_folder(target, stage="export", settings=settings, inputs=inputs) as folder,
    ):
        factors = {}
        lost = whole = 0.0
        for name in progress(sorted(opened.layers), "export"):
            layer = delta_layer(name, opened)
            if not layer.has_factors:
                raise ArtifactError(
                    f"{opened.folder}: {name} is stored as {layer.kind}, which has no factors; "
                    "compress the delta with svd or delta_come, or write it dense"
                )
            if expert_matrix(name) is not None:
                raise ArtifactError(
                    f"{opened.folder}: {name} is one expert's matrix, which peft has no adapter "
                    "for; write the delta dense"
                )
            left, right = layer.factors()  # [out, rank], [rank, in]
            if max_rank is not None:
                left, right, dropped, norm = _truncated(left, right, max_rank)
                lost, whole = lost + dropped, whole + norm
            if len(right) > 0:
                factors[name] = (right, left)
        if not factors:
            raise ArtifactError(f"{opened.folder}: all layers have rank 0; nothing to export")
        rank = max(len(right) for right, _ in factors.values())
        tensors = {}
        for name, (right, left) in factors.items():
            padding = rank - len(right)
            padded = functional.pad(right, (0, 0, 0, padding)), functional.pad(left, (0, padding))
            for side, factor in zip(FACTORS, padded, strict=True):
                tensors[f"{PREFIX}{name}{side}"] = factor.to(dtype).contiguous()
        settings |= {"rank": rank, "relative_error": (lost / whole) ** 0.5 if lost else 0.0}
        save_tensors(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(
            folder / ADAPTER_CONFIG,
            _config(list(factors), rank, base_name or opened.header["base"]["name"]),
        )
    if lost:
        logger.warning(
            "%s: rank %d leaves out %.2g of the delta's norm", out, rank, settings["relative_error"]
        )
    if left_out:
        logger.warning(
            "%s: lacks %d tensors that the delta keeps exactly, an adapter has no place for them: "
            "%s",
            out,
            len(left_out),
            ", ".join(left_out),
        )
    return out


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best factors of at most ``rank``, and squared norms: of what is lost, of all.

    Args:
        left: ``[out, r]``.
        right: ``[r, in]``.
        rank: What to keep.
    """
    q_left, r_left = torch.linalg.qr(left.float())
    q_right, r_right = torch.linalg.qr(right.float().T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    squares = values.double().square()
    norm = float(squares.sum())
    if len(right) <= rank:
        return left, right, 0.0, norm
    scaled = u[:, :rank] * values[:rank]
    return q_left @ scaled, v[:rank] @ q_right.T, float(squares[rank:].sum()), norm


def _config(layers: list[str], rank: int, base_name: str) -> dict[str, object]:
    """Return adapter_config.json: alpha is the rank, so that scaling is 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
    }
