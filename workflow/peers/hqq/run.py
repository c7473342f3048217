"""HQQ: half-quadratic quantization, which needs no calibration.

HQQ stores a scale and an unrounded zero point of 16 bits per group, and three bits as ten codes in
32 bits: 2 bits in groups of 64 are 2.5 true bits, 3 bits are 3.7.
"""

import torch
from common import Job, check_levels, run
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def quantize(job: Job, *, bits: int, group_size: int, axis: int = 1) -> None:
    """Quantize, count the packed state, export.

    Args:
        job: The model and where it goes.
        bits: Width of a code.
        group_size: Weights with one scale.
        axis: 1 as the documentation; 0 also exists.
    """
    model, layers = job.load_dense(), {}
    config = {"nbits": bits, "group_size": group_size, "axis": axis}

    def replace() -> None:
        for name in job.linears:
            parent, _, child = name.rpartition(".")
            layers[name] = HQQLinear(
                getattr(model.get_submodule(parent), child),
                quant_config=BaseQuantizeConfig(**config),
                compute_dtype=torch.float16,
                device="cpu",
            )
            setattr(model.get_submodule(parent), child, layers[name])

    job.timed(replace)
    stored_bits = job.bits(
        {
            f"{n}.{k}": value
            for n, layer in layers.items()
            for k, value in layer.state_dict().items()
        }
    )
    for layer in layers.values():  # compute in fp32 with the fp16 scales and zero points it stores
        layer.meta["compute_dtype"] = torch.float32
        layer.meta |= {key: layer.meta[key].float() for key in ("scale", "zero")}
    weights = {name: layer.dequantize() for name, layer in layers.items()}
    if axis == 1:  # along axis 0 a group is no part of a row
        check_levels(weights, bits, group_size)
    job.export(
        weights,
        stored_bits,
        packages=("hqq", "torch", "transformers"),
        logits=lambda tokens: model(tokens).logits,
    )


if __name__ == "__main__":
    run(quantize)
