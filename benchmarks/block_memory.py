"""Memory of finetuning one block of real size: what 70B needs on the accelerator, and on the host.

Builds a model of one block with the shapes of a config.json (random weights and codes) and runs
`tune_blocks` on it. Every tensor is counted from the moment an operation makes it until its storage
is freed, so the peak is the same on a CPU as on a GPU, up to work space inside the kernels. On a
GPU the allocator's own peak stands beside it, on a CPU the process's anonymous memory.

With ``--scale s`` widths, heads and tokens are ``s`` times and codebook entries ``s²`` times as
many: every tensor of the block is then ``s²`` times as large, so a small machine can tell, too.

    python benchmarks/block_memory.py --scale 0.25
    python benchmarks/block_memory.py --scale 0.5
"""

import json
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import typer
from memory import status, watch
from tables import append_rows, origin
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from llmpress.core.artifacts import write_json
from llmpress.core.resume import BlockStore
from llmpress.methods.cluscomp import ClusComp
from llmpress.models.checkpoints.compressed import model_config
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import layer_entry
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.nn.packing import pack
from llmpress.tuning.blocks import tune_blocks
from llmpress.tuning.settings import TuningSettings

LLAMA_2_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LENGTH = 2048


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it made."""
        del types
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.note(leaf)
        return output

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.freed, key, storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        """Forget a storage."""
        self._known.discard(key)
        self.bytes -= size


def build(root: Path, scale: float, entries: int, vector_size: int) -> None:
    """Write a random model of one block in bf16, and the same with random codes and codebooks."""
    config = LlamaConfig(
        **{key: int(value * scale) for key, value in LLAMA_2_70B.items()},
        vocab_size=512,
        num_hidden_layers=1,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    original, compressed = root / "model", root / "compressed"
    for folder in (original, compressed):
        folder.mkdir()
        config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    dense, small, layers = CheckpointWriter(original), CheckpointWriter(compressed), {}
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) + (len(shape) == 1)
        dense.add(name, weight)
        if "_proj" not in name:
            small.add(name, weight)
            continue
        layer = CodebookLinear(
            shape[1], shape[0], num_entries=entries, vector_size=vector_size, dtype="float16"
        )
        codes = torch.randint(entries, (layer.num_vectors,))
        layer.codes = pack(codes, layer.code_bits)
        layer.codebook.data.normal_(0, 0.02)
        layers[name.removesuffix(".weight")] = layer_entry(layer.kind, layer.spec())
        for key, tensor in layer.tensors().items():
            small.add(f"{name.removesuffix('.weight')}.{key}", tensor)
    dense.close()
    small.close()
    content = model_config(Checkpoint(original), torch.bfloat16, layers)
    write_json(compressed / "config.json", content)


def child(root: Path, length: int, batch: int) -> None:
    """Finetune the block for one step and write down the peaks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original, compressed = Checkpoint(root / "model"), Checkpoint(root / "compressed")
    teacher, student = (
        BlockWalk(skeleton(c), c, device=device, autocast=True) for c in (original, compressed)
    )
    tokens = torch.randint(512, (2 * batch, length))
    before = status()
    with LiveTensors() as live:
        sizes = {"original": block_bytes(teacher), "compressed": block_bytes(student)}
        live.peak = live.bytes
        blocks = tune_blocks(
            teacher,
            student,
            ClusComp(num_entries=2, vector_size=1),
            tokens[:batch],
            tokens[batch:],
            TuningSettings(epochs=1, learning_rate=1e-5, batch_size=batch),
            seed=0,
            store=BlockStore("tune", {}, root / "scratch"),
        )
        next(blocks)
        peak = live.peak
        blocks.close()
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    write_json(
        root / "result.json",
        {
            "peak": peak,
            "sizes": sizes,
            "states": tokens.numel() * original.config.hidden_size * 4,
            "before": before,
            "after": status(),
            "device_bytes": on_device,
        },
    )


def block_bytes(walk: BlockWalk) -> int:
    """Bytes of one block as it is held."""
    block = walk.load(0)
    held = [*block.parameters(), *block.buffers()]
    return sum(t.numel() * t.element_size() for t in held)


def main(
    entries: int = typer.Option(65500, help="Codebook entries."),
    vector_size: int = typer.Option(8, help="Length of a codebook vector."),
    scale: float = typer.Option(1.0, help="Of widths, heads and tokens: 1, 0.5 or 0.25."),
    batch: int = typer.Option(1, help="Windows of a step."),
    root: Path = typer.Option(None, hidden=True),
    out: Path = typer.Option(Path("benchmarks/results/block_memory.csv"), help="A row is added."),
) -> None:
    """Measure one block with the shapes of Llama-2-70B and append a row."""
    if root is not None:
        child(root, int(LENGTH * scale), batch)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, scale, int(entries * scale**2), vector_size)
        command = [sys.executable, __file__, "--root", name, "--scale", str(scale)]
        anonymous = watch([*command, "--batch", str(batch)])
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    row = {
        "model": "Llama-2-70B",
        "scale": scale,
        "entries": entries,
        "vector_size": vector_size,
        "batch_tokens": batch * int(LENGTH * scale),
        "original_block_bytes": result["sizes"]["original"],
        "compressed_block_bytes": result["sizes"]["compressed"],
        "peak_tensor_bytes": result["peak"],
        "peak_at_full_scale_bytes": round(result["peak"] / scale**2),
        "states_bytes": result["states"],
        "anonymous_before_bytes": result["before"]["RssAnon"],
        "anonymous_peak_bytes": anonymous,
        "device_peak_bytes": result["device_bytes"],
        **origin(),
    }
    print(row)
    append_rows(out, [row])


if __name__ == "__main__":
    typer.run(main)
