"""Whole decoder blocks removed: those that turn the hidden states least.

Source: ShortGPT, arXiv 2403.03853: one minus the mean cosine between what enters a block and what
leaves it. As many blocks go as fit into the reduction, so never more than was asked for.
"""

import re
from typing import Any

import torch
from common import Job, run
from torch.nn import functional
from transformers import AutoConfig

BF16_BITS = 16
BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def remove_blocks(job: Job, *, reduction: float, windows: int | None = None) -> None:
    """Write the model without some of its blocks, in bf16.

    Args:
        job: The model and where it goes.
        reduction: Share of the whole model's weights to remove.
        windows: Of the calibration, evenly spaced; all by default.
    """
    read = job.windows[:: max(1, len(job.windows) // (windows or len(job.windows)))]
    found: list[float] = []
    job.timed(lambda: found.extend(turns(job.load_dense(), read)))
    order = sorted(range(len(found)), key=lambda index: found[index])
    sizes = {name: tensor.numel() for name, tensor in job.original.items()}
    of_a_block = sum(n for name, n in sizes.items() if BLOCK.match(name)) / len(order)
    removed = sorted(order[: int(reduction * sum(sizes.values()) // of_a_block)])
    kept = [index for index in range(len(order)) if index not in removed]
    tensors = {}
    for name, tensor in job.original.items():
        match = BLOCK.match(name)
        if match and int(match[1]) in removed:
            continue
        place = f"model.layers.{kept.index(int(match[1]))}." if match else ""
        tensors[place + name[match.end() if match else 0 :]] = tensor.bfloat16().contiguous()
    job.write(tensors, shorter(AutoConfig.from_pretrained(job.model).to_dict(), kept))
    left = sum(w.numel() for n, w in job.linears.items() if int(BLOCK.match(n)[1]) in kept)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    packages = ("torch", "transformers")
    job.note(BF16_BITS * left, packages, model_bytes=stored, removed=removed)


@torch.inference_mode()
def turns(model: Any, windows: torch.Tensor) -> list[float]:
    """Return one minus the mean cosine of each block's input and output."""
    sums = [0.0] * len(model.model.layers)

    def compare(index: int) -> Any:
        def hook(_: Any, entering: Any, leaving: Any) -> None:
            states = leaving[0] if isinstance(leaving, tuple) else leaving
            sums[index] += float(functional.cosine_similarity(entering[0], states, dim=-1).sum())

        return hook

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(compare(index))
    for window in windows:
        model.model(window[None], use_cache=False)
    return [1 - total / windows.numel() for total in sums]


def shorter(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the configuration of a model of the blocks that are kept."""
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][index] for index in kept]
    return config | {"num_hidden_layers": len(kept), "dtype": "bfloat16"}


if __name__ == "__main__":
    run(remove_blocks)
