"""llm-compressor: GPTQ with static activation order, its default, and ranges of least error."""

from pathlib import Path

import torch
from common import Job, check_levels, run, tensors_of, unpack_words
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def quantize(
    job: Job,
    *,
    bits: int,
    group_size: int = 64,
    sym: bool = False,
    observer: str = "memoryless_mse",
    batch_size: int = 8,
) -> None:
    """Quantize, save packed, export what the packed file holds.

    Args:
        job: The model and where it goes.
        bits: Width of a code.
        group_size: Weights with one scale.
        sym: Without zero points.
        observer: How ranges are chosen.
        batch_size: Windows at a time.
    """
    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "group",
        "group_size": group_size,
        "observer": observer,
        "observer_kwargs": {"maxshrink": 0.8, "patience": 80},  # its 0.2 is for wider codes
    }
    recipe = GPTQModifier(
        ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": scheme}}
    )
    ids = job.windows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})

    def quantize_and_save() -> None:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=job.windows.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            batch_size=batch_size,
        )
        model.save_pretrained(job.packed, save_compressed=True)

    job.timed(quantize_and_save)
    weights = dequantized(job, job.packed, bits)
    check_levels(weights, bits, group_size)
    job.export(
        weights,
        job.bits(tensors_of(job.packed)),
        packages=("llmcompressor", "compressed-tensors", "torch", "transformers"),
        logits=lambda tokens: own(job)(tokens).logits,
    )


def dequantized(job: Job, folder: Path, num_bits: int) -> dict[str, torch.Tensor]:
    """Dequantize a pack-quantized checkpoint: signed codes, zero points packed along rows."""
    tensors, weights = tensors_of(folder), {}
    for name, original in job.linears.items():
        num_out, num_in = original.shape
        codes = unpack_words(tensors[f"{name}.weight_packed"], num_bits)[:, :num_in]
        scales = tensors[f"{name}.weight_scale"].float()  # [out, groups]
        zeros = tensors.get(f"{name}.weight_zero_point")
        offset = 2 ** (num_bits - 1)
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpack_words(zeros.T, num_bits).T[:num_out]
            zeros = zeros - offset
        zeros = torch.zeros_like(scales) if zeros is None else zeros
        grouped = (codes - offset).reshape(num_out, scales.shape[1], -1)
        weights[name] = ((grouped - zeros[..., None]) * scales[..., None]).reshape(num_out, num_in)
    return weights


def own(job: Job) -> torch.nn.Module:
    """Load the packed model with compressed-tensors' own layers."""
    return AutoModelForCausalLM.from_pretrained(job.packed, dtype=torch.float32).eval()


if __name__ == "__main__":
    run(quantize)
