"""Write the low-rank part of a compressed delta as a LoRA adapter that peft loads."""

import logging
from pathlib import Path

import torch

from llmpress.core.artifacts import artifact_folder, claim, save_tensors, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.errors import ArtifactError
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
    dtype: torch.dtype | str = torch.bfloat16,
    force: bool = False,
) -> Path:
    """Write a compressed delta of low-rank layers as a folder for ``PeftModel.from_pretrained``.

    Every layer has the rank it has in the delta, and a scaling of 1. Layers of rank 0 are left out.
    Tensors that the delta keeps exactly have no place in a LoRA adapter: they are named in a
    warning and, as ``not_in_the_adapter``, among the settings in provenance.json.

    Args:
        delta: A compressed delta, by a method that stores factors (svd, delta_come).
        out: Folder to write: adapter_config.json and adapter_model.safetensors.
        base_name: What adapter_config.json calls the base; by default the delta's name of it.
        dtype: What the factors are stored in.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: No compressed delta, a damaged one, a layer that is no product of factors, or
            ``out`` exists.
        ConfigError: Another dtype than bfloat16, float16 and float32.
    """
    out, dtype = Path(out), pick_dtype(dtype)
    opened = DeltaFolder(Path(delta), "compressed_delta")
    if changed := computed_changes(opened.config):
        raise ArtifactError(
            f"{opened.folder}: the fine-tuned model's {', '.join(changed)} differ from its base's, "
            "which no adapter holds; write the delta dense"
        )
    left_out = opened.exact_names()
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "form": "adapter",
        "not_in_the_adapter": left_out,
    }
    inputs = {"delta": opened.folder}
    with (
        claim(out, force=force, inputs=inputs.values()) as target,
        artifact_folder(target, stage="export", settings=settings, inputs=inputs) as folder,
    ):
        tensors, ranks = {}, {}
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
            if len(right) > 0:
                ranks[name] = len(right)
                for side, factor in zip(FACTORS, (right, left), strict=True):
                    tensors[f"{PREFIX}{name}{side}"] = factor.to(dtype).contiguous()
        if not ranks:
            raise ArtifactError(f"{opened.folder}: all layers have rank 0; nothing to export")
        save_tensors(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(
            folder / ADAPTER_CONFIG, _config(ranks, base_name or opened.header["base"]["name"])
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


def _config(ranks: dict[str, int], base_name: str) -> dict[str, object]:
    """Return adapter_config.json: alpha is the rank everywhere, so that scaling is 1."""
    rank = max(ranks.values())
    own = {name: value for name, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": own,
        "alpha_pattern": own,
    }
