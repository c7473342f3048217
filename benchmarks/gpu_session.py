"""Everything a GPU can tell within ten minutes, in the order of what is worth knowing first.

Each step is a process of its own with a time limit. Rows are written as they come, and a ledger
(`benchmarks/results/gpu_ledger.csv`) says which step ran at which commit and how it ended.

    python benchmarks/gpu_session.py               # every step
    python benchmarks/gpu_session.py loops decode  # these
    python benchmarks/gpu_session.py --dry         # tiny shapes, without a GPU
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from tables import append_rows, origin

HERE = Path(__file__).parent


class Step(NamedTuple):
    """What is run, and the seconds it may take."""

    command: tuple[str, ...]
    seconds: int
    tiny: tuple[str, ...] = ()


def steps(out: Path, dry: bool) -> dict[str, Step]:
    """Return all steps, most telling first."""
    python, kernels = sys.executable, str(HERE / "kernels.py")
    own = (python, str(HERE / "gpu_steps.py"))
    to = ("--out", str(out))
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "8", "-m", "gpu")
    small = ("--dry",) if dry else ()
    ops = (python, kernels, "--out", str(out / "gpu_kernels.csv"))
    tiny = ("--model", "tiny", "--rows", "1", "--rows", "64")
    real = ("--model", "Llama-2-7B up")
    rows = [part for count in (1, 4, 16, 64, 2048) for part in ("--rows", str(count))]
    sizes = tiny if dry else (*real, *rows)
    block = ("--model", "Llama-2-7B", "--out", str(out / "gpu_blocks.csv"), "--windows")
    width = ("--fraction", "0.03125", "--only", "compress rtn")
    block += ("4", "--length", "32", *width) if dry else ("32", "--length", "2048")

    def op(name: str, seconds: int) -> Step:
        return Step((*ops, *sizes, "--op", name), seconds)

    return {
        "kernel_tests": Step((*tests, "tests/nn/kernels"), 100),
        "model_tests": Step((*tests, "tests/nn/layers", "tests/gpu"), 100),
        "quantized": op("quantized_matmul", 40),
        "codebook": op("codebook_matmul", 45),
        "decode": Step((*own, "decode", *to, *small), 60),
        "loops": Step((*own, "loops", *to, *small), 50),
        "backward": Step((*own, "backward", *to, *small), 30),
        "syncs": Step((*own, "syncs", *to, *small), 60),
        "delta": op("delta_matmul", 50),
        "blocks": Step((python, str(HERE / "blocks.py"), "measure", *block), 120),
    }


def main(
    only: list[str] = typer.Argument(None, help="Names of steps; all by default."),
    dry: bool = typer.Option(False, help="Tiny shapes, to see on a CPU that every step runs."),
    out: Path = typer.Option(HERE / "results", help="Folder of rows and ledger."),
    limit: int = typer.Option(480, help="Seconds for everything."),
) -> None:
    """Run the steps one after the other."""
    if not dry and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; --dry runs every step on tiny shapes")
    known = steps(out, dry)
    if unknown := set(only or ()) - set(known):
        raise SystemExit(f"error: {sorted(unknown)} unknown; steps are {', '.join(known)}")
    started, failed = time.monotonic(), []
    for name in only or known:
        left = limit - (time.monotonic() - started)
        if left < 5:
            print(f"== {name}: no time left", flush=True)
            failed.append(name)
            continue
        code, took = run(name, known[name], min(left, known[name].seconds), out)
        if code != 0:
            failed.append(name)
        row = {"step": name, "exit": code, "seconds": round(took, 1)}
        append_rows(out / "gpu_ledger.csv", [row | origin("triton", "transformers")])
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    raise SystemExit(1 if failed else 0)


def run(name: str, step: Step, seconds: float, out: Path) -> tuple[int, float]:
    """Run a step in a group of its own; return its exit status (124: out of time) and seconds."""
    print(f"== {name} ({seconds:.0f} s)", flush=True)
    log = out / f"gpu_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-1500:], flush=True)
    print(f"== {name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
    return code, time.monotonic() - started


if __name__ == "__main__":
    typer.run(main)
