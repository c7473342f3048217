"""How long each kind of artifact takes to load and what it holds in memory, against a dense one.

Every measurement is a process of its own: modules are imported first, then the clock starts. Files
are in the page cache (the first repetition is thrown away), so what is measured is work, not disk.

    python benchmarks/loading.py MODEL ARTIFACT... --base MODEL
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import typer
from tables import append_rows, origin

MEASURE = """
import json, resource, sys, time
import torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM
import llmpress, llmpress.deltas.applying, llmpress.models.loading
from llmpress.core.artifacts import verify

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
base, folder = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
AutoModelForCausalLM.from_config(transformers.LlamaConfig(  # what the first load imports
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
started = time.perf_counter()
verify(Path(folder))
verified = time.perf_counter()
before = peak()
is_delta = (Path(folder) / "delta.json").is_file()
if is_delta:
    model = llmpress.load_model(base, dtype=torch.bfloat16)
    started, before = time.perf_counter() - (verified - started), peak()
    verified = time.perf_counter()
    model = llmpress.load_delta(model, folder)
else:
    model = llmpress.load_model(folder, dtype=torch.bfloat16)
loaded = time.perf_counter()
held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
print(json.dumps({
    "verify_seconds": verified - started, "load_seconds": loaded - verified,
    "held_bytes": sum(held.values()), "peak_growth_bytes": peak() - before}))
"""


def main(
    folders: list[Path] = typer.Argument(help="Artifacts; the first is the baseline."),
    base: Path = typer.Option(..., help="The model that deltas are put on."),
    repetitions: int = typer.Option(4, min=2, help="Processes per artifact; the first is dropped."),
    out: Path = typer.Option(Path("benchmarks/results/loading.csv"), help="Rows are appended."),
) -> None:
    """Measure loading in bf16 and append a row per artifact."""
    for folder in (*folders, base):
        if not folder.is_dir():
            raise SystemExit(f"error: {folder}: no such folder; make report makes the default ones")
    measured = origin("transformers")
    rows, reference = [], None
    for folder in folders:
        results = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", MEASURE, str(base), str(folder)],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(repetitions)
        ][1:]
        seconds = sorted(result["load_seconds"] for result in results)
        row = {
            "artifact": folder.name,
            "stored_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
            "held_bytes": results[0]["held_bytes"],
            "peak_growth_bytes": int(statistics.median(r["peak_growth_bytes"] for r in results)),
            "load_seconds_p50": round(statistics.median(seconds), 3),
            "load_seconds_min": round(seconds[0], 3),
            "load_seconds_max": round(seconds[-1], 3),
            "verify_seconds_p50": round(statistics.median(r["verify_seconds"] for r in results), 3),
        }
        reference = reference or row
        row["load_ratio"] = round(row["load_seconds_p50"] / reference["load_seconds_p50"], 2)
        row["held_ratio"] = round(row["held_bytes"] / reference["held_bytes"], 3)
        row |= {
            "baseline": folders[0].name,
            "dtype": "bfloat16",
            "repetitions": len(results),
            **measured,
        }
        rows.append(row)
        print({key: row[key] for key in list(row)[:10]})
    append_rows(out, rows)


if __name__ == "__main__":
    typer.run(main)
