"""GPTQModel: GPTQ with activation order inside groups ("act group aware"), its default.

Symmetric, without a search of the range, is its default.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
import torch
from common import Job, check_levels, gptq_weights, run, tensors_of
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def quantize(
    job: Job,
    *,
    bits: int,
    group_size: int = 64,
    sym: bool = True,
    mse: float = 0.0,
    desc_act: bool = False,
    batch_size: int = 8,
) -> None:
    """Quantize, save packed, export what the packed file holds.

    Args:
        job: The model and where it goes.
        bits: Width of a code.
        group_size: Weights with one scale.
        sym: Without zero points.
        mse: Exponent of the search of ranges; 0 searches none.
        desc_act: Activation order over the whole row instead of inside groups.
        batch_size: Windows at a time.
    """
    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        mse=mse,
        desc_act=desc_act,
        act_group_aware=not desc_act,
    )
    examples = [
        {"input_ids": window.tolist(), "attention_mask": [1] * len(window)}
        for window in job.windows
    ]

    def quantize_and_save() -> None:
        model = GPTQModel.load(str(job.model), config, device="cpu", dtype=torch.bfloat16)
        model.quantize(examples, batch_size=batch_size)
        model.save(str(job.packed))

    job.timed(quantize_and_save)
    weights = gptq_weights(job, job.packed, bits, zero_offset=True)
    check_levels(weights, bits, 1 if desc_act else group_size)
    job.export(
        weights,
        job.bits(tensors_of(job.packed)),
        packages=("gptqmodel", "torch", "transformers"),
        logits=lambda tokens: own(job)(tokens).logits,
    )


def own(job: Job) -> torch.nn.Module:
    """Load the packed model with GPTQModel's own layers, which take no fp32."""
    return GPTQModel.load(
        str(job.packed), device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16
    ).model.eval()


if __name__ == "__main__":
    run(quantize)
