"""Many deltas on one base: how fast they are swapped, what a decoding step and the memory cost.

The delta is added once per tenant, each time with tensors of its own. Providers take turns, so that
a machine whose speed drifts drifts for all. Dense models answer one after the other, each for its
row: one of them does so in place of all, as no cache holds the weights of one until its next turn.

    python benchmarks/delta_serving.py MODEL DELTA
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import torch
import typer
from tables import append_rows, origin
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

import llmpress

ROWS = (1, 4, 16)
SWAPS = 50
LOADS = 5


def main(
    model: Path = typer.Argument(help="The base, plain or compressed."),
    delta: Path = typer.Argument(help="A compressed delta of it."),
    context: int = typer.Option(128, help="Tokens in the cache of keys and values."),
    rounds: int = typer.Option(11, min=3, help="Steps of each provider; the first is not counted."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:1."),
    out: Path = typer.Option(Path("benchmarks/results/delta_serving.csv"), help="Rows to append."),
) -> None:
    """Time swaps and decoding steps in bf16, and count what is held in memory."""
    base = llmpress.load_model(model, dtype=torch.bfloat16, device=device)
    dense = llmpress.load_finetuned(model, delta, dtype=torch.bfloat16, device=device)
    dense = llmpress.dequantized(dense)
    base_bytes, dense_bytes = _held(base), _held(dense)
    loads = [_milliseconds(lambda: _load_and_remove(base, delta), device) for _ in range(LOADS)]
    tenants = [f"tenant-{number}" for number in range(max(ROWS))]
    rows: list[dict[str, object]] = []
    with llmpress.DeltaBank(base) as bank:
        for tenant in tenants:
            bank.add(tenant, delta)
        each = bank.nbytes(tenants[0])
        one, every = [], []
        for swap in range(SWAPS):
            name = tenants[swap % len(tenants)]
            one.append(_milliseconds(lambda name=name: bank.use(name), device))
            every.append(_milliseconds(lambda: bank.use(tenants), device))
        held = base_bytes + len(tenants) * each
        rows += [
            _row("swap", "bank, one for all rows", 1, one, held, one),
            _row("swap", "bank, one for each row", len(tenants), every, held, one),
            _row("swap", "load_delta and remove_delta", 1, loads, base_bytes + each, one),
        ]
        for count in ROWS:
            some = tenants[:count]
            uses: dict[str, tuple[PreTrainedModel, Callable[[], None], int, int]] = {
                "base alone": (base, lambda: bank.use(None), 1, base_bytes),
                "bank, one for all rows": (
                    base,
                    lambda: bank.use("tenant-0"),
                    1,
                    base_bytes + each,
                ),
                "bank, one for each row": (
                    base,
                    lambda some=some: bank.use(some),
                    1,
                    base_bytes + count * each,
                ),
                "dense models": (dense, lambda: None, count, count * dense_bytes),
            }
            times: dict[str, list[float]] = {provider: [] for provider in uses}
            bank.use(None)
            caches = {size: _cache(base, size, context) for size in (1, count)}
            for _ in tqdm(range(rounds), desc=f"{count} rows", unit="round"):
                for provider, (answering, use, turns, _) in uses.items():
                    use()
                    cache = caches[count // turns]
                    times[provider].append(turns * _step(answering, cache, device))
            for provider, (*_, size) in uses.items():
                reference = times["base alone"][1:]
                rows.append(_row("step", provider, count, times[provider][1:], size, reference))
    shared = {"base": model.name, "delta": delta.name}
    settings = {"dtype": "bfloat16", "context": context, "threads": torch.get_num_threads()}
    measured = origin("transformers")
    append_rows(out, [{**shared, **row, **settings, **measured} for row in rows])


def _row(
    measure: str,
    provider: str,
    rows: int,
    times: list[float],
    held_bytes: int,
    reference: list[float],
) -> dict[str, object]:
    """Return a row; the ratio is that of the medians, to the fastest way or to the base alone."""
    p20, p50, p80 = (quantiles(times, n=10, method="inclusive")[place] for place in (1, 4, 7))
    row: dict[str, object] = {"measure": measure, "provider": provider, "rows": rows}
    row |= {"p20_ms": round(p20, 2), "p50_ms": round(p50, 2), "p80_ms": round(p80, 2)}
    row["ratio"] = round(p50 / quantiles(reference, n=2, method="inclusive")[0], 2)
    row |= {"held_mb": round(held_bytes / 1e6, 1), "repetitions": len(times)}
    print(row)
    return row


@torch.inference_mode()
def _cache(model: PreTrainedModel, rows: int, context: int) -> DynamicCache:
    """Return keys and values of some tokens; which ones does not matter for speed."""
    tokens = torch.ones(rows, context, dtype=torch.int64, device=model.device)
    cache: DynamicCache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    return cache


@torch.inference_mode()
def _step(model: PreTrainedModel, cache: DynamicCache, device: str) -> float:
    """Return the milliseconds of one token after those in the cache, which stays as it is."""
    tokens = torch.ones(len(cache.layers[0].keys), 1, dtype=torch.int64, device=model.device)
    taken = _milliseconds(lambda: model(tokens, past_key_values=cache, use_cache=True), device)
    cache.crop(-1)
    return taken


def _load_and_remove(model: PreTrainedModel, delta: Path) -> None:
    llmpress.remove_delta(llmpress.load_delta(model, delta))


def _milliseconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _held(model: PreTrainedModel) -> int:
    """Return the bytes of all tensors, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


if __name__ == "__main__":
    typer.run(main)
