"""AutoRound: rounding and ranges tuned block by block with signed gradient descent.

    build/peers/venv-autoround/bin/python benchmarks/peers/run_autoround.py --bits 2 --group-size 64

Its default recipe is 200 iterations of batches of 8; here the windows are 512 tokens, not 2048.
"""

import argparse
import json
from pathlib import Path

import torch
from auto_round import AutoRound
from common import (
    MODEL,
    PACKED,
    awq_weights,
    calibration_windows,
    check_levels,
    export,
    gptq_weights,
    load_dense,
    once,
    packed_bits,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, save packed, export what the packed file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--alg-ext", action="store_true", help="what it recommends at 2 bits, sym")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--lr", type=float, default=None, help="1 / iters when not given")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--suffix", default="", help="of the folder's name")
    arguments = parser.parse_args()
    windows = calibration_windows()
    batches = windows.split(arguments.batch_size)  # larger ones than batch_size it refuses
    settings = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": arguments.sym,
        "iters": arguments.iters,
        "lr": arguments.lr,
        "batch_size": arguments.batch_size,
        "enable_alg_ext": arguments.alg_ext,
    }
    peer = AutoRound(
        load_dense(),
        AutoTokenizer.from_pretrained(MODEL),
        scheme=f"W{arguments.bits}A16",
        dataset=[{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in batches],
        seqlen=windows.shape[1],
        nsamples=len(windows),
        device_map="cpu",
        enable_torch_compile=False,
        **settings,
    )
    name = f"autoround-{arguments.bits}bit-g{arguments.group_size}{arguments.suffix}"
    packed = PACKED / name
    seconds = once(
        packed, lambda: peer.quantize_and_save(output_dir=str(packed), format="auto_round")
    )
    packed = next(file.parent for file in sorted(packed.rglob("*.safetensors")))
    layout = json.loads((packed / "config.json").read_text())["quantization_config"]
    packing = layout.get("packing_format", "")
    weights = (
        awq_weights(packed)
        if packing.endswith("awq")
        else gptq_weights(packed, arguments.bits, zero_offset="gptq" in packing)
    )
    check_levels(weights, arguments.bits, arguments.group_size)
    export(
        name,
        method="autoround",
        settings=settings | {"enable_minmax_tuning": True, "seqlen": windows.shape[1]},
        nominal_bits=arguments.bits,
        weights=weights,
        stored_bits=packed_bits(packed),
        seconds=seconds,
        calibration_tokens=windows.numel(),
        packages=("auto-round", "torch", "transformers"),
        # its loader has no working CPU layer for AWQ's layout, which it takes at four bits
        logits=None if packing.endswith("awq") else lambda tokens: _own(packed)(tokens).logits,
    )


def _own(packed: Path) -> torch.nn.Module:
    """Load the packed model with AutoRound's own layers."""
    return AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, device_map="cpu"
    ).eval()


if __name__ == "__main__":
    main()
