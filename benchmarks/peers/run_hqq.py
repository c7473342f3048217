"""HQQ: half-quadratic quantization, which needs no calibration.

    build/peers/venv-hqq/bin/python benchmarks/peers/run_hqq.py --bits 2 --group-size 64

HQQ stores a scale and an unrounded zero point of 16 bits per group, and three bits as ten codes in
32 bits: 2 bits in groups of 64 are 2.5 true bits, 3 bits are 3.7.
"""

import argparse
from time import perf_counter

import torch
from common import check_levels, export, linears, load_dense, tensor_bits
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    """Quantize, count the packed state, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--axis", type=int, default=1, help="1 as the documentation; 0 also exists")
    arguments = parser.parse_args()
    settings = {"nbits": arguments.bits, "group_size": arguments.group_size, "axis": arguments.axis}
    model, layers = load_dense(), {}
    started = perf_counter()
    for name in linears():
        parent, _, child = name.rpartition(".")
        layers[name] = HQQLinear(
            getattr(model.get_submodule(parent), child),
            quant_config=BaseQuantizeConfig(**settings),
            compute_dtype=torch.float16,
            device="cpu",
        )
        setattr(model.get_submodule(parent), child, layers[name])
    seconds = perf_counter() - started
    stored_bits = tensor_bits(
        {
            f"{n}.{key}": value
            for n, layer in layers.items()
            for key, value in layer.state_dict().items()
        }
    )
    for layer in layers.values():  # compute in fp32 with the fp16 scales and zero points it stores
        layer.meta["compute_dtype"] = torch.float32
        layer.meta |= {key: layer.meta[key].float() for key in ("scale", "zero")}
    weights = {name: layer.dequantize() for name, layer in layers.items()}
    if arguments.axis == 1:  # along axis 0 a group is no part of a row
        check_levels(weights, arguments.bits, arguments.group_size)
    export(
        f"hqq-{arguments.bits}bit-g{arguments.group_size}-axis{arguments.axis}",
        method="hqq",
        settings=settings | {"optimize": True, "compute_dtype": "float16"},
        nominal_bits=arguments.bits,
        weights=weights,
        stored_bits=stored_bits,
        seconds=seconds,
        calibration_tokens=0,
        packages=("hqq", "torch", "transformers"),
        logits=lambda tokens: model(tokens).logits,
    )


if __name__ == "__main__":
    main()
