"""Tokens per second and bytes of low-rank models against their dense originals, in one process.

Models take turns, so that a machine whose speed drifts drifts for all; rows hold medians and the
median of the ratios to the dense model of the same round. Weights are those of the artifacts, for
the mixture and Mamba random ones of a trained model's shapes: they do not matter for speed.

    python benchmarks/low_rank_speed.py MODEL ARTIFACT...
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import typer
from decode import held_bytes
from tables import append_rows, origin
from tqdm import tqdm
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig, PretrainedConfig
from transformers import PreTrainedModel as Model

from llmpress.compression.stage import compress_model
from llmpress.core.devices import pick_device
from llmpress.methods.lillama import Lillama
from llmpress.models.loading import load_model

BATCHES = (1, 16)
SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4}
OTHERS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(
        **SIZES, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4
    ),
    "mamba": MambaConfig(**SIZES),
}


def main(
    model: Path = typer.Argument(help="The dense original."),
    artifacts: list[Path] = typer.Argument(help="Low-rank models made from it."),
    reduction: float = typer.Option(0.2, help="What goes from the mixture and from Mamba."),
    prompt: int = typer.Option(64, help="Tokens of the prompt."),
    steps: int = typer.Option(8, help="Tokens generated after it."),
    rounds: int = typer.Option(7, help="Turns of each model; the first is not counted."),
    out: Path = typer.Option(Path("benchmarks/results/low_rank_speed.csv"), help="Rows to append."),
) -> None:
    """Time prefill and decode in bf16 at batch 1 and 16."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        groups = {model.name: {"dense": model, **{a.name: a for a in artifacts}}}
        groups |= {name: dict(_made(name, reduction, Path(scratch))) for name in OTHERS}
        for name, folders in groups.items():
            loaded = {key: load_model(path, dtype=torch.bfloat16) for key, path in folders.items()}
            for batch in BATCHES:
                rows += _rows(name, loaded, batch, prompt, steps, rounds)
            del loaded
    append_rows(out, rows)


def _made(name: str, reduction: float, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Write a model and its low-rank forms."""
    dense = scratch / name
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name]).save_pretrained(dense)
    (dense / "tokenizer.json").write_text("{}", encoding="utf-8")
    yield "dense", dense
    for form in ("factors", "pivoted"):
        method = Lillama(reduction=reduction, start="weights", strategy="uniform", form=form)  # type: ignore[arg-type]  # both are forms
        folder = scratch / f"{name}-{form}"
        compress_model(
            dense,
            method=method,
            seed=0,
            device=pick_device(),
            scratch=scratch / "blocks",
            out=folder,
        )
        yield f"lillama-{reduction}-{form}", folder


def _rows(
    name: str, models: dict[str, Model], batch: int, prompt: int, steps: int, rounds: int
) -> list[dict[str, object]]:
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in models}
    for _ in tqdm(range(rounds), desc=f"{name}, batch {batch}", unit="round"):
        for key, model in models.items():
            times[key].append(_timed(model, batch, prompt, steps))
    measured = origin("transformers")
    rows = []
    for key, model in models.items():
        pairs = list(zip(times[key][1:], times["dense"][1:], strict=True))
        row: dict[str, object] = {"model": name, "artifact": key, "batch": batch}
        for part, what in enumerate(("prefill", "decode")):
            tokens = batch * (prompt if part == 0 else steps)
            row[f"{what}_tokens_per_second"] = round(tokens / median(a[part] for a, _ in pairs), 1)
            row[f"{what}_ratio_to_dense"] = round(median(b[part] / a[part] for a, b in pairs), 3)
        row |= {"held_mb": round(held_bytes(model) / 1e6, 1), "dtype": "bfloat16"}
        row |= {"prompt": prompt, "steps": steps, "rounds": rounds - 1}
        row |= {"threads": torch.get_num_threads(), **measured}
        rows.append(row)
        print({k: row[k] for k in list(row)[:8]})
    return rows


@torch.inference_mode()
def _timed(model: Model, batch: int, prompt: int, steps: int) -> tuple[float, float]:
    """Return the seconds of one prefill and of ``steps`` greedy tokens after it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4000, (batch, prompt), generator=generator)
    started = time.perf_counter()
    output = model(tokens, use_cache=True)
    prefilled = time.perf_counter()
    name = "cache_params" if "cache_params" in output else "past_key_values"
    for _ in range(steps):
        tokens = output.logits[:, -1:].argmax(dim=-1)
        output = model(tokens, use_cache=True, **{name: output[name]})
    return prefilled - started, time.perf_counter() - prefilled


if __name__ == "__main__":
    typer.run(main)
