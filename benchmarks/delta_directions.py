"""Seconds and error of the ways to the leading directions of a delta.

The baseline is torch.linalg.svd of the whole matrix in fp32. A way's error is the energy that its
leading directions miss, relative to what the best ones of that number miss in fp64. Matrices are
random with the falling spectrum of a fine-tuning delta, σ_i = i^-p.

    python benchmarks/delta_directions.py --size 576 --size 1024
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import scipy.linalg
import torch
import typer
from tables import append_rows, origin
from torch import Tensor

from llmpress.core.environment import hardware
from llmpress.numerics.low_rank import OutputDirections


def whole_svd(delta: Tensor, rank: int) -> Tensor:
    """Decompose everything in fp32, keep ``rank``."""
    return torch.linalg.svd(delta, full_matrices=False)[0][:, :rank]


def whole_gram(delta: Tensor, rank: int) -> Tensor:
    """All eigenvectors of the Gram matrix in fp64: what delta_come does."""
    return OutputDirections(delta, torch.eye(delta.shape[1])).leading(rank)


def part_of_gram(delta: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of the Gram matrix alone, in fp64, by LAPACK's dsyevr."""
    weights = delta.double()
    gram, size = (weights @ weights.T).numpy(), len(delta)
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=(size - rank, size - 1), driver="evr")
    return torch.from_numpy(vectors[:, ::-1].copy())


def randomized(passes: int) -> Callable[[Tensor, int], Tensor]:
    """Halko, Martinsson and Tropp's, in fp32, 16 more directions than needed."""

    def directions(delta: Tensor, rank: int) -> Tensor:
        wanted = min(rank + 16, *delta.shape)
        return torch.svd_lowrank(delta, q=wanted, niter=passes)[0][:, :rank]

    return directions


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "torch.linalg.svd, fp32": whole_svd,
    "Gram matrix, fp64": whole_gram,
    "leading part of the Gram matrix, fp64": part_of_gram,
    "randomized, 1 pass": randomized(1),
    "randomized, 3 passes": randomized(3),
}


def main(
    size: list[int] = typer.Option([576, 1024, 2048], help="Outputs; repeatable."),
    wide: float = typer.Option(1.0, help="Inputs over outputs."),
    share: list[float] = typer.Option([0.1, 0.35], help="Ranks over the full rank; repeatable."),
    decay: float = typer.Option(0.7, help="p of the spectrum."),
    rounds: int = typer.Option(3, min=1, help="Median of so many."),
    out: Path = typer.Option(Path("benchmarks/results/delta_directions.csv")),
) -> None:
    """Append a row per matrix, rank and way."""
    for rows in size:
        columns = int(wide * rows)
        torch.manual_seed(0)
        left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64)).Q
        spectrum = torch.arange(1, rows + 1, dtype=torch.float64) ** -decay
        delta = ((left * spectrum) @ right.T).float()
        for rank in (max(1, int(part * rows)) for part in share):
            least = float(spectrum[rank:].square().sum())
            baseline = None
            for name, way in WAYS.items():
                seconds = []
                for _ in range(rounds):
                    started = time.perf_counter()
                    vectors = way(delta, rank).double()
                    seconds.append(time.perf_counter() - started)
                kept = float((vectors.T @ delta.double()).square().sum())
                missed = float(delta.double().square().sum()) - kept
                taken = median(seconds)
                baseline = baseline or taken
                row = {
                    "rows": rows,
                    "columns": columns,
                    "rank": rank,
                    "way": name,
                    "seconds": round(taken, 4),
                    "ratio_to_svd": round(baseline / taken, 3),
                    "excess_error": f"{missed / least - 1:.2e}",
                    "decay": decay,
                    "rounds": rounds,
                    "threads": torch.get_num_threads(),
                    "cores": hardware()["cores"],
                    **origin(),
                }
                append_rows(out, [row])
                print(", ".join(f"{k}={v}" for k, v in row.items() if k in list(row)[:7]))


if __name__ == "__main__":
    typer.run(main)
