"""llm-compressor: GPTQ with static activation order, its default, and ranges of least error.

build/peers/venv-llmcompressor/bin/python benchmarks/peers/run_llmcompressor.py --bits 3
"""

import argparse
from pathlib import Path

import torch
from common import (
    MODEL,
    PACKED,
    calibration_windows,
    check_levels,
    export,
    linears,
    once,
    packed_bits,
    packed_tensors,
    unpack_words,
)
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize, save packed, export what the packed file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--suffix", default="", help="of the folder's name")
    arguments = parser.parse_args()
    windows = calibration_windows()
    weights_scheme = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": arguments.sym,
        "strategy": "group",
        "group_size": arguments.group_size,
        "observer": arguments.observer,
        "observer_kwargs": {"maxshrink": 0.8, "patience": 80},  # its 0.2 is for wider codes
    }
    recipe = GPTQModifier(
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights_scheme}},
    )
    ids = windows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})
    name = f"llmcompressor-{arguments.bits}bit-g{arguments.group_size}{arguments.suffix}"
    packed = PACKED / name

    def quantize_and_save() -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
            batch_size=8,
        )
        model.save_pretrained(packed, save_compressed=True)

    seconds = once(packed, quantize_and_save)
    weights = _weights(packed, arguments.bits)
    check_levels(weights, arguments.bits, arguments.group_size)
    export(
        name,
        method="llmcompressor-gptq",
        settings=weights_scheme
        | {"actorder": "static", "dampening_frac": recipe.dampening_frac, "dtype": "bfloat16"},
        nominal_bits=arguments.bits,
        weights=weights,
        stored_bits=packed_bits(packed),
        seconds=seconds,
        calibration_tokens=windows.numel(),
        packages=("llmcompressor", "compressed-tensors", "torch", "transformers"),
        logits=lambda tokens: _own(packed)(tokens).logits,
    )


def _weights(folder: Path, num_bits: int) -> dict[str, torch.Tensor]:
    """Dequantize a pack-quantized checkpoint: signed codes, zero points packed along rows."""
    tensors, weights = packed_tensors(folder), {}
    for name, original in linears().items():
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


def _own(packed: Path) -> torch.nn.Module:
    """Load the packed model with compressed-tensors' own layers."""
    return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
