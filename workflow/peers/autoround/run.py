"""AutoRound: rounding and ranges tuned block by block with signed gradient descent.

Its default recipe is 200 iterations of batches of 8; here the windows are 512 tokens, not 2048.
"""

import json
from pathlib import Path

import torch
from auto_round import AutoRound
from common import Job, awq_weights, check_levels, gptq_weights, run, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(
    job: Job,
    *,
    bits: int,
    group_size: int = 64,
    sym: bool = False,
    iters: int = 200,
    lr: float | None = None,
    batch_size: int = 8,
    enable_alg_ext: bool = False,
) -> None:
    """Quantize, save packed, export what the packed file holds.

    Args:
        job: The model and where it goes.
        bits: Width of a code.
        group_size: Weights with one scale.
        sym: Without zero points.
        iters: Steps for each block.
        lr: 1 / iters by default.
        batch_size: Windows of a step.
        enable_alg_ext: What it recommends for two symmetric bits.
    """
    batches = job.windows.split(batch_size)  # larger ones than batch_size it refuses
    peer = AutoRound(
        job.load_dense(),
        AutoTokenizer.from_pretrained(job.model),
        scheme=f"W{bits}A16",
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in batches],
        seqlen=job.windows.shape[1],
        nsamples=len(job.windows),
        device_map="cpu",
        enable_torch_compile=False,
        bits=bits,
        group_size=group_size,
        sym=sym,
        iters=iters,
        lr=lr,
        batch_size=batch_size,
        enable_alg_ext=enable_alg_ext,
    )
    job.timed(lambda: peer.quantize_and_save(output_dir=str(job.packed), format="auto_round"))
    packed = next(file.parent for file in sorted(job.packed.rglob("*.safetensors")))
    layout = json.loads((packed / "config.json").read_text())["quantization_config"]
    packing = layout.get("packing_format", "")
    weights = (
        awq_weights(job, packed)
        if packing.endswith("awq")
        else gptq_weights(job, packed, bits, zero_offset="gptq" in packing)
    )
    check_levels(weights, bits, group_size)
    job.export(
        weights,
        job.bits(tensors_of(packed)),
        packages=("auto-round", "torch", "transformers"),
        # its loader has no working CPU layer for AWQ's layout, which it takes at four bits
        logits=None if packing.endswith("awq") else lambda tokens: own(packed)(tokens).logits,
    )


def own(packed: Path) -> torch.nn.Module:
    """Load the packed model with AutoRound's own layers."""
    return AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, device_map="cpu"
    ).eval()


if __name__ == "__main__":
    run(quantize)
