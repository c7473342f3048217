"""How fast runs are as they are stored, against their originals, with the spread of the rounds."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any


def speed_rows(speed: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row of the table for each run that was timed.

    Args:
        speed: Content of results/speed.json; empty where nothing was.
    """
    for name, run in (speed.get("runs") or {}).items():
        yield {
            "run": name,
            "original": run["original"],
            "decode": _ratio(run["decode_ratios"]),
            "prefill": _ratio(run["prefill_ratios"]),
            "decode_tokens": f"{run['decode_tokens_per_second']:.1f}",
            "prefill_tokens": f"{run['prefill_tokens_per_second']:.0f}",
        }


def speed_caption(speed: Mapping[str, Any]) -> str:
    """Return how it was measured, in a sentence or two."""
    if not speed.get("runs"):
        return ""
    machine = speed["hardware"]
    return (
        f"Times as fast as the original, median (least to most) of the rounds in turns: "
        f"{speed['prefill_tokens']} tokens of prompt, then {speed['decode_tokens']} generated, one "
        f"sequence at a time, in {speed['dtype']}, on {machine['gpu'] or machine['processor']}, "
        f"threads: {speed['num_threads']}. Compressed layers stay packed."
    )


def _ratio(rounds: Sequence[float]) -> str:
    return f"{median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"
