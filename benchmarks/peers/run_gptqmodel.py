"""GPTQModel: GPTQ with activation order inside groups ("act group aware"), its default.

    build/peers/venv-gptqmodel/bin/python benchmarks/peers/run_gptqmodel.py --bits 3 --asym

Symmetric, without a search of the range, is its default; the flags are its other settings.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
import torch
from common import (
    MODEL,
    PACKED,
    calibration_windows,
    check_levels,
    export,
    gptq_weights,
    once,
    packed_bits,
)
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    """Quantize, save packed, export what the packed file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of the search of ranges")
    parser.add_argument("--desc-act", action="store_true", help="instead of act_group_aware")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--suffix", default="", help="of the folder's name")
    arguments = parser.parse_args()
    settings = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": not arguments.asym,
        "mse": arguments.mse,
        "desc_act": arguments.desc_act,
        "act_group_aware": not arguments.desc_act,
    }
    config = QuantizeConfig(**settings)
    windows = calibration_windows()
    examples = [
        {"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows
    ]
    name = f"gptqmodel-{arguments.bits}bit-g{arguments.group_size}{arguments.suffix}"
    packed = PACKED / name

    def quantize_and_save() -> None:
        model = GPTQModel.load(str(MODEL), config, device="cpu", dtype=torch.bfloat16)
        model.quantize(examples, batch_size=arguments.batch_size)
        model.save(str(packed))

    seconds = once(packed, quantize_and_save)
    weights = gptq_weights(packed, arguments.bits, zero_offset=True)
    check_levels(weights, arguments.bits, 1 if arguments.desc_act else arguments.group_size)
    export(
        name,
        method="gptqmodel",
        settings=settings | {"damp_percent": config.damp_percent, "dtype": "bfloat16"},
        nominal_bits=arguments.bits,
        weights=weights,
        stored_bits=packed_bits(packed),
        seconds=seconds,
        calibration_tokens=windows.numel(),
        packages=("gptqmodel", "torch", "transformers"),
        logits=lambda tokens: _own(packed)(tokens).logits,
    )


def _own(packed: Path) -> torch.nn.Module:
    """Load the packed model with GPTQModel's own layers, which take no fp32."""
    return GPTQModel.load(
        str(packed), device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16
    ).model.eval()


if __name__ == "__main__":
    main()
