"""Tokens per second of compressed models against the dense one, and the bytes they hold.

Each model decodes as it does by default, and one that keeps unpacked weights also with none kept.
`dense-in-blocks` is the dense one with the weights of its blocks in the order that compressed
layers keep theirs in on a CPU. Before anything is timed, the logits are compared with those of the
dense model of the same weights in fp32: in bf16 they may be twice as far from those as the dense
model's own in bf16.

Models take turns, so that a machine whose speed drifts drifts for all; ratios are medians over the
rounds.

    python benchmarks/decode.py MODEL ARTIFACT... --delta DELTA
"""

import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import typer
from tables import append_rows, origin
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import llmpress
from llmpress.nn.layers import CompressedLinear, DenseStore
from llmpress.nn.layers.blocked import in_blocks, linear

BATCHES = (1, 8)
DENSE = ("dense", "dense-in-blocks")
SENTENCE = "The history of the city begins in the twelfth century, when a small settlement was"
"""Models are compared on text: on tokens without sense bf16's rounding decides."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(
    model: Path = typer.Argument(help="The dense original."),
    artifacts: list[Path] = typer.Argument(help="Compressed models made from it."),
    delta: list[Path] = typer.Option([], help="Compressed deltas of it; repeatable."),
    dtype: list[str] = typer.Option(list(DTYPES), help="Computed in; repeatable."),
    prompt: int = typer.Option(32, min=1, help="Tokens of the prompt."),
    steps: int = typer.Option(4, min=1, help="Tokens generated after it."),
    rounds: int = typer.Option(6, min=3, help="Turns of each; the first is not counted."),
    out: Path = typer.Option(Path("benchmarks/results/decode.csv"), help="Rows to append."),
) -> None:
    """Time decoding at batch 1 and 8."""
    for name in dtype:
        models = {key: llmpress.load_model(model, dtype=DTYPES[name]) for key in DENSE}
        reorder(models["dense-in-blocks"])
        for folder in artifacts:
            models[folder.name] = llmpress.load_model(folder, dtype=DTYPES[name])
        for folder in delta:
            models[folder.name] = llmpress.load_finetuned(model, folder, dtype=DTYPES[name])
        for folder in artifacts:
            check(models[folder.name], (folder,), DTYPES[name])
        for folder in delta:
            check(models[folder.name], (model, folder), DTYPES[name])
        for batch in BATCHES:
            append_rows(out, measured(models, name, batch, prompt, steps, rounds))
        del models


@torch.inference_mode()
def reorder(model: PreTrainedModel) -> None:
    """Have a dense model's linears multiply by weights in oneDNN's order, but for its head.

    The plain weights, which nothing reads any more, count as the bytes of the reordered ones.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            (weight,) = in_blocks([module.weight])
            module.forward = partial(reordered_product, weight, module.bias)


def reordered_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ``x Wᵀ + b``."""
    y = linear(x, weight)
    return y if bias is None else y + bias


@torch.inference_mode()
def check(model: PreTrainedModel, folders: tuple[Path, ...], dtype: torch.dtype) -> None:
    """Refuse to time a model that does not give what its dense weights give."""
    tokens = llmpress.load_tokenizer(folders[0])(SENTENCE, return_tensors="pt").input_ids
    expected = dense_logits(folders, torch.float32, tokens)
    allowed = 1e-3
    if dtype != torch.float32:  # its rounding is felt differently where weights are not rounded
        allowed = 2 * distance(dense_logits(folders, dtype, tokens), expected)
    error = distance(model(tokens).logits.float(), expected)
    if not error < allowed:
        raise SystemExit(f"error: {folders[-1]}: logits differ from the dense ones by {error:.1e}")


def dense_logits(folders: tuple[Path, ...], dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Return what the dense weights of a compressed model, or of a base and a delta, give."""
    load = llmpress.load_model if len(folders) == 1 else llmpress.load_finetuned
    return llmpress.dequantized(load(*folders, dtype=dtype))(tokens).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of logits."""
    return float((found - expected).norm() / expected.norm())


def measured(
    models: dict[str, PreTrainedModel], dtype: str, batch: int, prompt: int, steps: int, rounds: int
) -> list[dict[str, object]]:
    """Return a row for each model and for what it keeps."""
    kept = {(key, True): model for key, model in models.items()}
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in kept}
    held: dict[tuple[str, bool], int] = {}
    for _ in tqdm(range(rounds), desc=f"{dtype}, batch {batch}", unit="round"):
        for key, model in kept.items():
            seconds[key].append(decoded(model, batch, prompt, steps))
            held[key] = held_bytes(model)
    bare = {(key, False): m for key, m in models.items() if llmpress.dense_bytes(m)}
    seconds |= {key: [] for key in bare}
    for _ in tqdm(range(3), desc=f"{dtype}, batch {batch}, nothing kept", unit="round"):
        for key, model in bare.items():
            before = [(layer, layer.dense_store) for layer in stores(model)]
            for layer, _ in before:
                layer.dense_store = DenseStore(0)
            seconds[key].append(decoded(model, batch, prompt, 1))
            held[key] = held_bytes(model, stored_only=True)
            for layer, store in before:
                layer.dense_store = store
    dense = seconds["dense", True][1:]
    rows: list[dict[str, object]] = []
    for (key, keeps), times in seconds.items():
        low, *_, high = quantiles(times[1:], n=5)
        middle = median(times[1:])
        rows.append(
            {
                "model": key,
                "keeps_unpacked": keeps and (key in DENSE or llmpress.dense_bytes(models[key]) > 0),
                "dtype": dtype,
                "batch": batch,
                "tokens_per_second": round(batch / middle, 2),
                "ratio_to_dense": round(
                    median(b / a for a, b in zip(times[1:], dense, strict=False)), 3
                ),
                "step_ms_p20": round(1e3 * low, 2),
                "step_ms_p50": round(1e3 * middle, 2),
                "step_ms_p80": round(1e3 * high, 2),
                "held_mb": round(held[key, keeps] / 1e6, 1),
                "prompt": prompt,
                "steps": steps if keeps else 1,
                "rounds": len(times) - 1,
                "threads": torch.get_num_threads(),
                **origin("transformers"),
            }
        )
    return rows


def stores(model: PreTrainedModel) -> list[CompressedLinear]:
    """Return the layers that may keep unpacked weights."""
    return [m for m in model.modules() if isinstance(m, CompressedLinear) and m.dense_store]


def held_bytes(model: PreTrainedModel, *, stored_only: bool = False) -> int:
    """Return the bytes of all tensors of a model, with those that it unpacked."""
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    stored = sum(t.nbytes for t in tensors.values())
    return stored if stored_only else stored + llmpress.dense_bytes(model)


@torch.inference_mode()
def decoded(model: PreTrainedModel, batch: int, prompt: int, steps: int) -> float:
    """Return the seconds of one step of greedy decoding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4000, (batch, prompt), generator=generator)
    output = model(tokens, use_cache=True)
    started = time.perf_counter()
    for _ in range(steps):
        tokens = output.logits[:, -1:].argmax(dim=-1)
        output = model(tokens, use_cache=True, past_key_values=output.past_key_values)
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    typer.run(main)
