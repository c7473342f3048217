"""Every stage of every method on one decoder block with the shapes of a large model.

    python benchmarks/blocks.py                                  # on a GPU: full size
    python benchmarks/blocks.py --fraction 0.0625 --fraction 0.125  # on a CPU: widths are that part

The block has random weights, of trained models' kind: a spectrum that falls slowly, a few channels
that are much larger. Widths, heads and tokens are the same fraction of the original's; a head stays
as wide, a mixture keeps its experts. A stage runs in a process of its own. Seconds of the parts are
those of single functions; what is left is reading, writing, Python.

Rows say what one block took, and what the whole model takes by it: times its blocks. With two
fractions each stage also gets the power of the width that its seconds grew by, and the whole model
by that power. Text stays the same, so that a factor for tokens has to be applied by who reads.
"""

import cProfile
import json
import math
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import typer
from tables import append_rows, origin
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import llmpress
from llmpress.core.environment import peak_memory_bytes

HERE = Path(__file__).parent
VOCABULARY = 512
HEAD = 128


class Size(NamedTuple):
    """What a block of a model is made of, and how many there are."""

    config: type[PreTrainedConfig]
    blocks: int
    hidden: int
    intermediate: int
    key_value_heads: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})


MODELS = {
    "Llama-2-7B": Size(LlamaConfig, 32, 4096, 11008, 32),
    "Llama-2-70B": Size(LlamaConfig, 80, 8192, 28672, 8),
    "Mixtral-8x7B": Size(MixtralConfig, 32, 4096, 14336, 8, {"num_local_experts": 8}),
    "Qwen3-32B": Size(Qwen3Config, 64, 5120, 25600, 8, {"head_dim": HEAD}),
    "Mamba-2.8B": Size(MambaConfig, 64, 2560, 5120, 0, {"state_size": 16}),
}

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"num_bits": 4, "group_size": 128},
    "gptq": {"num_bits": 4, "group_size": 128},
    "cluscomp": {"bits": 2.6},
    "svd": {"keep": 0.8, "whiten": True},
    "lillama": {"reduction": 0.2},
}
DELTAS: dict[str, dict[str, Any]] = {"delta_come": {"bits": 1.0}}
TUNED = {
    "cluscomp": {"epochs": 1, "learning_rate": 0.01},
    "lillama": {"epochs": 1, "learning_rate": 0.001},
}

PARTS = {
    "kmeans": "k-means",
    "assign_with_feedback": "codes with feedback",
    "improve_codes": "better codes",
    "refit_codebook": "codebook again",
    "feed_errors_back": "error feedback",
    "damped_inverse_cholesky": "factor of the moment",
    "output_factors": "factors",
    "OutputDirections.__init__": "directions",
    "output_energy": "energies",
    "relative_output_error": "errors",
    "relative_weight_error": "errors",
    "run_backward": "backward",
    "step": "optimizer",
}


def config_of(name: str, fraction: float, *, blocks: int = 1) -> PreTrainedConfig:
    """Return the configuration of some blocks of a model, at a fraction of its width."""
    size = MODELS[name]
    hidden = max(HEAD, round(size.hidden * fraction / HEAD) * HEAD)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": max(HEAD, round(size.intermediate * hidden / size.hidden)),
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "architectures": [size.config.__name__.replace("Config", "ForCausalLM")],
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        **size.settings,
    }
    if size.key_value_heads:
        heads = (
            hidden // HEAD if "head_dim" not in size.settings else round(64 * hidden / size.hidden)
        )
        groups = (
            64 if "head_dim" in size.settings else size.hidden // HEAD
        ) // size.key_value_heads
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // groups)}
    return size.config(**sizes)


def trained_like(weight: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix: noise, a part whose spectrum falls as one over the root, large channels."""
    rows, columns = weight.shape[-2:]
    rank = min(64, rows, columns)
    for matrix in weight.view(-1, rows, columns):
        left = torch.randn(rows, rank, generator=generator)
        right = torch.randn(rank, columns, generator=generator)
        falling = torch.arange(1, rank + 1).rsqrt()[:, None]
        channels = torch.randn(columns, generator=generator).mul(0.3).exp()
        channels[torch.randperm(columns, generator=generator)[: max(1, columns // 512)]] *= 8
        noise = torch.randn(rows, columns, generator=generator)
        matrix.copy_((noise + left @ (falling * right) / rank**0.5) * channels / columns**0.5)


def build(
    folder: Path, name: str, fraction: float, seed: int = 0, near: Path | None = None
) -> None:
    """Write a random model of one block with a tokenizer of numbers; or a fine-tuned one."""
    generator = torch.Generator().manual_seed(seed)
    if near is None:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name, fraction), dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(near, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in (
            p for key, p in model.named_parameters() if p.ndim > 1 and "embed" not in key
        ):
            if near is None and "conv" not in key_of(model, weight):
                made = torch.empty(weight.shape)
                trained_like(made, generator)
                weight.copy_(made)
            elif near is not None:
                rank = min(8, *weight.shape[-2:])
                left = torch.randn(*weight.shape[:-1], rank, generator=generator)
                right = torch.randn(*weight.shape[:-2], rank, weight.shape[-1], generator=generator)
                weight.add_(left @ right, alpha=1e-3 / rank**0.5)
    model.save_pretrained(folder)
    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="0", unk_token="0"
    ).save_pretrained(folder)


def key_of(model: torch.nn.Module, weight: Tensor) -> str:
    """Return the name of a parameter."""
    return next(name for name, found in model.named_parameters() if found is weight)


def write_text(file: Path, tokens: int) -> None:
    """Write random numbers, some of them much more often than others, as words."""
    generator = torch.Generator().manual_seed(7)
    chances = torch.arange(1, VOCABULARY + 1).float().reciprocal()
    drawn = torch.multinomial(chances, 2 * tokens, replacement=True, generator=generator).tolist()
    lines = (drawn[start : start + 500] for start in range(0, len(drawn), 500))
    file.write_text(
        "\n\n".join(" ".join(map(str, line)) for line in lines) + "\n", encoding="utf-8"
    )


def stages(root: Path, windows: int, length: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, in order: later ones need what earlier ones wrote."""
    text: dict[str, Any] = {"text": root / "text.txt", "windows": windows, "length": length}
    base, other = root / "base", root / "finetuned"
    made: dict[str, Callable[[], object]] = {
        "calibrate": lambda: llmpress.calibrate_model(base, out=root / "statistics", **text)
    }
    for method, settings in METHODS.items():
        made[f"compress {method}"] = lambda m=method, s=settings: llmpress.compress_model(
            base, method=m, out=root / m, calibration=root / "statistics", **s
        )
        if method in TUNED:
            made[f"finetune {method}"] = lambda m=method: llmpress.finetune_model(
                root / m,
                original=base,
                out=root / f"{m}-tuned",
                calibration=root / "statistics",
                **TUNED[m],
            )
    made["extract delta"] = lambda: llmpress.extract_delta(base, other, out=root / "delta")
    made["calibrate finetuned"] = lambda: llmpress.calibrate_model(
        other, out=root / "statistics-finetuned", **text
    )
    for method, settings in DELTAS.items():
        made[f"compress {method}"] = lambda m=method, s=settings: llmpress.compress_delta(
            root / "delta", method=m, out=root / m, calibration=root / "statistics-finetuned", **s
        )
    return made


app = typer.Typer(add_completion=False, no_args_is_help=False)


@app.command(hidden=True)
def one(root: Path, stage: str, windows: int, length: int) -> None:
    """Run one stage and print what it took: a process of its own."""
    for name in llmpress.__all__:  # an import is no work
        getattr(llmpress, name)
    call, profile = stages(root, windows, length)[stage], cProfile.Profile()
    before, started = os.times(), time.perf_counter()
    profile.enable()
    call()
    profile.disable()
    seconds, after = time.perf_counter() - started, os.times()
    parts: dict[str, float] = {}
    for (_, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if part := PARTS.get(function):
            parts[part] = parts.get(part, 0.0) + cumulative
    print(
        json.dumps(
            {
                "seconds": round(seconds, 2),
                "cpu_seconds": round(sum(after[:2]) - sum(before[:2]), 2),
                "peak_gb": round(peak_memory_bytes() / 1e9, 2),
                "parts": {part: round(spent, 2) for part, spent in parts.items() if spent >= 0.01},
            }
        )
    )


@app.command()
def measure(
    model: list[str] = typer.Option(list(MODELS), help="Whose shapes."),
    fraction: list[float] = typer.Option([1.0], help="Of the width."),
    windows: int = typer.Option(8, help="Token windows of the text."),
    length: int = typer.Option(256, help="Tokens of a window."),
    only: str = typer.Option("", help="Stages whose names begin so, and what they need."),
    out: Path = typer.Option(HERE / "results/blocks.csv", help="File of the rows."),
) -> None:
    """Measure every stage on one block of every model."""
    for name in model:
        seconds: dict[str, list[tuple[int, float]]] = {}
        for part in sorted(fraction):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                build(root / "base", name, part)
                build(root / "finetuned", name, part, seed=1, near=root / "base")
                write_text(root / "text.txt", windows * length * 2)
                for stage in chosen(list(stages(root, windows, length)), only):
                    took = run(root, stage, windows, length)
                    width = config_of(name, part).hidden_size
                    measured = seconds.setdefault(stage, [])
                    measured.append((width, took.get("seconds", math.nan)))
                    row = {
                        "model": name,
                        "stage": stage,
                        "fraction": part,
                        "width": width,
                        "tokens": windows * length,
                        **took,
                        **whole(name, measured),
                    }
                    append_rows(out, [row | origin("transformers")])
                    print({key: row[key] for key in row if key != "parts"}, flush=True)


def chosen(names: list[str], only: str) -> list[str]:
    """Return the stages whose names begin so, with what they need, in order."""
    wanted = {name for name in names if name.startswith(only)}
    for name in list(wanted):
        verb, _, method = name.partition(" ")
        if method in DELTAS:
            wanted |= {"extract delta", "calibrate finetuned"}
        elif verb in ("compress", "finetune"):
            wanted |= {"calibrate", f"compress {method}"}
    return [name for name in names if name in wanted]


def whole(name: str, measured: list[tuple[int, float]]) -> dict[str, Any]:
    """Return the power of the width, from two fractions, and the hours of the whole model."""
    (width, seconds), power, size = measured[-1], math.nan, MODELS[name]
    if width == size.hidden:
        power = 0.0
    elif len(measured) > 1 and measured[-2][1] > 0:
        power = math.log(seconds / measured[-2][1]) / math.log(width / measured[-2][0])
    hours = seconds * (size.hidden / width) ** power * size.blocks / 3600
    return {"power": round(power, 2), "whole_model_hours": float(f"{hours:.3g}")}


def run(root: Path, stage: str, windows: int, length: int) -> dict[str, Any]:
    """Run a stage in a process of its own; what failed is a row without numbers."""
    command = [sys.executable, __file__, "one", str(root), stage, str(windows), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{stage}: {(done.stderr.strip() or 'no message').splitlines()[-1]}", flush=True)
        return {"seconds": math.nan, "cpu_seconds": math.nan, "peak_gb": math.nan, "parts": {}}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"parts": json.dumps(found["parts"])}


if __name__ == "__main__":
    app()
