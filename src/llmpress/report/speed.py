"""How fast runs are as they are stored, against their originals, with the spread of the rounds."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from llmpress.report.grid import Grid

HEADINGS = ("Run", "Original", "Generating", "tokens/s", "Reading", "tokens/s")


def speed_table(speed: Mapping[str, Any]) -> Grid:
    """Return a row for each run that was timed.

    Args:
        speed: Content of results/speed.json; empty where nothing was.
    """
    runs = speed.get("runs") or {}
    rows = [
        [
            name,
            run["original"],
            _ratio(run["decode_ratios"]),
            f"{run['decode_tokens_per_second']:.1f}",
            _ratio(run["prefill_ratios"]),
            f"{run['prefill_tokens_per_second']:.0f}",
        ]
        for name, run in runs.items()
    ]
    machine = speed.get("hardware") or {}
    caption = (
        f"Times as fast as the original, median (least to most) of the rounds in turns: "
        f"{speed['prefill_tokens']} tokens of prompt, then {speed['decode_tokens']} generated, one "
        f"sequence at a time, in {speed['dtype']}, on {machine['gpu'] or machine['processor']}, "
        f"threads: {speed['num_threads']}. Compressed layers stay packed."
        if rows
        else ""
    )
    return Grid("Speed of runs as they are stored", caption, HEADINGS, rows)


def _ratio(rounds: Sequence[float]) -> str:
    return f"{median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"
