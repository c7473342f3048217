"""Peak memory of calibrating, compressing, finetuning and of deltas against the model's depth.

Random Llamas of growing depth in several shards; every measurement is a process of its own, watched
from outside. Two peaks are told apart: anonymous memory (``RssAnon``, what the process allocated;
sampled, because the kernel keeps no peak of it) and the whole resident set (``VmHWM``, the kernel's
own peak), which also counts pages of files that are mapped and that the system may drop.

    python benchmarks/memory.py --depths 4,8,16,32,64 --width 512
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import typer
from tables import append_rows, origin
from transformers import LlamaConfig, LlamaForCausalLM

from llmpress.calibration.files import load_windows, save_calibration
from llmpress.compression.stage import compress_model
from llmpress.core.artifacts import write_json
from llmpress.core.resume import BlockStore
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.cluscomp import ClusComp
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.tuning.blocks import tune_blocks
from llmpress.tuning.settings import TuningSettings
from llmpress.tuning.writing import rewrite_model

STAGES = ("calibrate", "compress", "finetune", "extract-delta", "compress-delta")
SHARDS = 4
WINDOWS, LENGTH = 8, 128
SAMPLE_SECONDS = 0.003
MMAP_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""Free memory goes back to the system at once, as it always does for matrices above 32 MB; below,
glibc keeps some of it, more after more blocks."""


def build(folder: Path, depth: int, width: int, seed: int = 0) -> None:
    """Write a random bf16 Llama of ``depth`` blocks in shards, one block in memory at a time."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(seed)
    one = LlamaForCausalLM(config).bfloat16()
    block_bytes = 2 * sum(p.numel() for p in one.model.layers.parameters())
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, max_shard_bytes=block_bytes * depth // SHARDS + 1)
    for name, tensor in one.state_dict().items():
        if not name.startswith("model.layers.0."):
            writer.add(name, tensor)
            continue
        for index in range(depth):
            noise = 0.02 * torch.randn(tensor.shape) + (tensor.ndim == 1)
            writer.add(name.replace(".0.", f".{index}.", 1), noise.bfloat16())
    writer.close()
    config.num_hidden_layers = depth
    config.save_pretrained(folder)


def run_stage(stage: str, root: Path, device: torch.device) -> None:
    """Run one stage on the model in ``root``; the earlier stages' artifacts lie there too."""
    method = ClusComp(num_entries=256, vector_size=4, iterations=1)
    model, calibration, compressed = root / "model", root / "calibration", root / "compressed"
    if stage == "compress":
        compress_model(
            model, method=method, seed=0, device=device, scratch=root / "scratch", out=compressed
        )
        return
    if stage == "extract-delta":
        extract_delta(model, root / "finetuned-model", out=root / "delta")
        return
    if stage == "compress-delta":
        compress_delta(
            root / "delta",
            method=DeltaCoMe(bits=0.25),
            seed=0,
            device=device,
            scratch=root / "scratch",
            out=root / "small-delta",
        )
        return
    original = Checkpoint(model)
    teacher = BlockWalk(skeleton(original), original, device=device, autocast=True)
    if stage == "calibrate":
        calibration.mkdir()
        tokens = torch.randint(512, (WINDOWS + 2, LENGTH), generator=torch.Generator())
        save_calibration(teacher, tokens[:WINDOWS], tokens[WINDOWS:], calibration)
        return
    small = Checkpoint(compressed)
    blocks = tune_blocks(
        teacher,
        BlockWalk(skeleton(small), small, device=device, autocast=True),
        method,
        *load_windows(calibration),
        TuningSettings(epochs=1, learning_rate=1e-3, batch_size=2),
        seed=0,
        store=BlockStore("finetune", {}, root / "scratch"),
    )
    (root / "finetuned").mkdir()
    rewrite_model(small, blocks, root / "finetuned")


def child(stage: str, root: Path) -> None:
    """Say what is resident before the stage, run it, say what the peak was."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    LlamaForCausalLM(  # what the first model imports
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    before = status()
    run_stage(stage, root, device)
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    result = {"before": before, "after": status(), "device_bytes": on_device}
    write_json(root / f"{stage}.json", result)


def status(pid: str = "self") -> dict[str, int]:
    """Memory of a process as the kernel counts it, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmHWM", "VmRSS")
    }


def watch(command: list[str]) -> int:
    """Run a process and return the peak of its anonymous memory, sampled all the time."""
    peak = 0
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | MMAP_THRESHOLD
        ) as process,
    ):
        while process.poll() is None:
            try:
                peak = max(peak, status(str(process.pid))["RssAnon"])
            except (KeyError, FileNotFoundError, ProcessLookupError):
                break  # it has just ended
            time.sleep(SAMPLE_SECONDS)
        if process.wait():
            log.seek(0)
            raise SystemExit(f"error: {log.read().decode()[-2000:]}")
    return peak


def slope(depths: list[int], peaks: list[int]) -> tuple[float, float]:
    """Least-squares slope and its standard error, in bytes per layer."""
    x, y = np.array(depths, dtype=float), np.array(peaks, dtype=float)
    centred = x - x.mean()
    estimate = float((centred * y).sum() / (centred**2).sum())
    residual = y - y.mean() - estimate * centred
    variance = float((residual**2).sum()) / (len(x) - 2) / float((centred**2).sum())
    return estimate, variance**0.5


def main(
    depths: str = typer.Option("4,8,16,32,64", help="Numbers of decoder blocks."),
    width: int = typer.Option(512, help="Hidden size; a multiple of 128."),
    stages: str = typer.Option(",".join(STAGES), help="Which; a stage needs those before it."),
    stage: str = typer.Option("", hidden=True),
    root: Path = typer.Option(Path(), hidden=True),
    out: Path = typer.Option(Path("benchmarks/results/memory.csv"), help="Rows are appended."),
) -> None:
    """Measure all stages at all depths and append a row per measurement."""
    if stage:
        child(stage, root)
        return
    counts = [int(depth) for depth in depths.split(",")]
    rows = []
    for depth in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build(folder / "model", depth, width)
            build(folder / "finetuned-model", depth, width, seed=1)
            weights = sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors"))
            for each in stages.split(","):
                peak = watch(
                    [sys.executable, __file__, "--stage", each, "--root", str(folder)],
                )
                result = json.loads((folder / f"{each}.json").read_text(encoding="utf-8"))
                before = result["before"]
                rows.append(
                    {
                        "stage": each,
                        "depth": depth,
                        "width": width,
                        "model_bytes": weights,
                        "anonymous_before_bytes": before["RssAnon"],
                        "anonymous_peak_bytes": max(peak, result["after"]["RssAnon"]),
                        "resident_before_bytes": before["VmHWM"],
                        "resident_peak_bytes": result["after"]["VmHWM"],
                        "device_peak_bytes": result["device_bytes"],
                    }
                )
                print(rows[-1], flush=True)
    for each in stages.split(","):
        own = [row for row in rows if row["stage"] == each]
        for kind in ("anonymous", "resident", "device"):
            peaks = [int(row[f"{kind}_peak_bytes"]) for row in own]
            estimate, error = slope(counts, peaks)
            print(f"{each} {kind}: {estimate / 1e3:.1f} ± {error / 1e3:.1f} kB per layer")
            for row in own:
                row |= {f"{kind}_slope": round(estimate), f"{kind}_slope_error": round(error)}
    measured = origin("transformers", "safetensors")
    append_rows(out, [row | measured for row in rows])


if __name__ == "__main__":
    typer.run(main)
