"""What each number is called, in which unit it is shown, and on which axis it is drawn."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

NO_VALUE = "—"


@dataclass(frozen=True)
class Measure:
    """One numeric column of the summary.

    Attributes:
        column: Its name in the summary.
        group: Heading it stands under.
        label: Its heading, without the group's.
        show: Number -> text with the unit's scale.
        log: Whether it spans orders of magnitude.
        scale: What the number is multiplied with on an axis.
        span: Largest number drawn, as a multiple of the smallest: a broken run has a perplexity of
            millions and would press all others together.
        stderr: Name of the column with its standard error.
        best: Whether low or high numbers are good.
    """

    column: str
    group: str
    label: str
    show: Callable[[float], str]
    log: bool = False
    scale: float = 1.0
    span: float = math.inf
    stderr: str | None = None
    best: Literal["low", "high"] = "low"

    @property
    def title(self) -> str:
        """Heading that stands alone."""
        return f"{self.group}: {self.label}" if self.group else self.label

    def text(self, row: pd.Series | Mapping[Hashable, Any]) -> str:
        """Return what the table shows for this column of ``row``."""
        value = row[self.column]
        if pd.isna(value) or (self.group == "Cost" and value == 0):  # 0: the step does not apply
            return NO_VALUE
        if not math.isfinite(value):
            return "infinite"
        if self.stderr and pd.notna(row[self.stderr]):
            return f"{self.show(value)} ± {short(row[self.stderr] * self.scale)}"
        return self.show(value)


@dataclass(frozen=True)
class LayerMeasure:
    """One number per layer: its column, its name, and whether its axis is logarithmic."""

    column: str
    label: str
    log: bool


LAYER_ERRORS = (
    LayerMeasure("relative_output_error", "Relative output error", log=True),
    LayerMeasure("relative_weight_error", "Relative weight error", log=True),
)


def significant(value: float) -> str:
    """Return four significant digits, without an exponent from 0.001 up to a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def short(value: float) -> str:
    """Return two significant digits: enough of an error."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def megabytes(value: float) -> str:
    """Return bytes as MB (10⁶ bytes)."""
    return f"{value / 1e6:,.1f}"


def decimals(digits: int) -> Callable[[float], str]:
    """Return a formatter with that many decimals."""
    return lambda value: f"{value:,.{digits}f}"


FIXED_FRONT = (
    Measure("bits_per_weight", "Size", "bits per weight", decimals(3)),
    Measure("model_bytes", "Size", "MB on disk", megabytes, scale=1e-6),
    Measure("ratio", "Size", "ratio to bf16", decimals(2), best="high"),
)
FIXED_BACK = (
    Measure("compress_seconds", "Cost", "compress, s", decimals(1)),
    Measure("compress_peak_memory_bytes", "Cost", "compress, peak MB", megabytes),
    Measure("finetune_seconds", "Cost", "finetune, s", decimals(1)),
    Measure("finetune_peak_memory_bytes", "Cost", "finetune, peak MB", megabytes),
)
SIZE_AXES = FIXED_FRONT


def quality_measures(columns: Iterable[str]) -> list[Measure]:
    """Return the quality columns that a summary holds, in the order of the table.

    Args:
        columns: The summary's columns.
    """
    columns = list(columns)
    per_corpus = (
        ("perplexity_", Measure("", "Perplexity", "", significant, log=True, span=100.0)),
        ("kl_", Measure("", "KL divergence, nats", "", significant, log=True)),
        (
            "top1_agreement_",
            Measure("", "Top-1 agreement, %", "", percent, scale=100.0, best="high"),
        ),
    )
    measures = [
        replace(
            measure,
            column=column,
            label=column.removeprefix(prefix),
            stderr=f"stderr_{column}" if f"stderr_{column}" in columns else None,
        )
        for prefix, measure in per_corpus
        for column in columns
        if column.startswith(prefix)
    ]
    group = "Task accuracy, %"
    for column in columns:
        if column.startswith("accuracy_"):
            task = column.removeprefix("accuracy_")
            measures.append(
                Measure(
                    column,
                    group,
                    task,
                    percent,
                    scale=100.0,
                    stderr=f"stderr_{task}",
                    best="high",
                )
            )
    error = "stderr_mean_accuracy" if "stderr_mean_accuracy" in columns else None
    mean = Measure("mean_accuracy", group, "mean", percent, scale=100.0, stderr=error, best="high")
    return [*measures, mean]


def table_measures(columns: Iterable[str]) -> list[Measure]:
    """Return every numeric column of the run table, in its order."""
    recovery = Measure(
        "recovery", "Task accuracy, %", "recovery", percent, scale=100.0, best="high"
    )
    return [*FIXED_FRONT, *quality_measures(columns), recovery, *FIXED_BACK]


def plain(value: Any) -> str:
    """Return a setting or a provenance value as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)
