"""What each number is called, in which unit it is shown, and on which axis it is drawn."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pandas as pd

from llmpress.evaluation.uncertainty import with_error

NO_VALUE = "—"
BROKEN = "broken"
KL, SAME, ACCURACY = "KL divergence, nats", "Same next token, %", "Task accuracy, %"
Row = Mapping[Hashable, Any]  # of the summary


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
        span: Largest number of a working run, as a multiple of the original's: perplexities of
            millions all say the same.
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
        return self.label if self.group in ("Size", "Cost") else f"{self.group}: {self.label}"

    @property
    def is_distance(self) -> bool:
        """Whether it compares with the original, so that a model has none of its own."""
        return self.group in (KL, SAME)

    def text(self, row: Row, original: Row | None = None) -> str:
        """Return what the table shows for this column of ``row``.

        Args:
            row: Of the summary.
            original: The row of the model it is compared with.
        """
        value = row[self.column]
        none = self.is_distance and row["kind"] == "model"
        if none or is_absent(value) or (self.group == "Cost" and value == 0):  # a model is not made
            return NO_VALUE
        if self.is_broken(row, original):
            return BROKEN
        error = float(row[self.stderr] or 0) if self.stderr else 0.0
        return with_error(value * self.scale, error * self.scale) if error > 0 else self.show(value)

    def is_broken(self, row: Row, original: Row | None = None) -> bool:
        """Tell whether the number is infinite, or further from the original's than its span."""
        value = float(row[self.column])
        if math.isinf(value):
            return True
        least = float(original[self.column]) if original is not None else math.nan
        return value > self.span * least  # False where either is unknown


@dataclass(frozen=True)
class LayerMeasure:
    """One number per layer: its column and its name."""

    column: str
    label: str


LAYER_ERRORS = (
    LayerMeasure("relative_output_error", "Relative output error"),
    LayerMeasure("relative_weight_error", "Relative weight error"),
)


def significant(value: float) -> str:
    """Return four significant digits, without an exponent from 0.001 up to a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def megabytes(value: float) -> str:
    """Return bytes as MB (10⁶ bytes)."""
    return f"{value / 1e6:,.1f}"


def decimals(digits: int) -> Callable[[float], str]:
    """Return a formatter with that many decimals."""
    return lambda value: f"{value:,.{digits}f}"


SIZES = (
    Measure("bits_per_weight", "Size", "bits per weight", decimals(2)),
    Measure("model_bytes", "Size", "MB on disk", megabytes, scale=1e-6),
    Measure("ratio", "Size", "times smaller than bf16", decimals(2), best="high"),
)
COSTS = (
    Measure("make_seconds", "Cost", "seconds to make", decimals(0)),
    Measure("make_peak_memory_bytes", "Cost", "peak MB", megabytes, scale=1e-6),
)
TRAINED = (
    Measure("trainable_parameters", "Trained", "parameters", decimals(0)),
    Measure("trainable_share", "Trained", "% of the model", lambda share: f"{100 * share:.2f}"),
)
MEAN_KL = Measure("mean_kl", KL, "mean", significant, log=True, stderr="stderr_mean_kl")
_share = partial(Measure, show=percent, scale=100.0, best="high")
RECOVERY = _share("recovery", ACCURACY, "recovery")
_FAMILIES = (  # prefix of the columns, one for each corpus or task, and the mean where there is one
    ("kl_", MEAN_KL),
    ("perplexity_", Measure("", "Perplexity", "", significant, log=True, span=100.0)),
    ("top1_agreement_", _share("mean_top1_agreement", SAME, "mean")),
    ("accuracy_", _share("mean_accuracy", ACCURACY, "mean")),
)


def quality_measures(columns: Iterable[str]) -> list[Measure]:
    """Return the quality columns that a summary holds, in the order of the table.

    A mean stands before what it is the mean of, and is left out where that is one number.
    """
    columns = list(columns)
    measures: list[Measure] = []
    for prefix, family in _FAMILIES:
        names = [column for column in columns if column.startswith(prefix)]
        if family.column in columns and len(names) > 1:
            measures.append(replace(family, stderr=f"stderr_{family.column}"))
        for column in names:
            label = column.removeprefix(prefix)
            error = f"stderr_{label if prefix == 'accuracy_' else column}"
            stderr = error if error in columns else None
            measures.append(replace(family, column=column, label=label, stderr=stderr))
    return measures


def is_absent(value: Any) -> bool:
    """Tell whether there is no value: None, NaN or pandas' NA."""
    return bool(pd.isna(value))


def shorten(name: str, letters: int = 40) -> str:
    """Return a name without the middle where it is longer than that many letters."""
    if len(name) <= letters:
        return name
    return f"{name[: letters // 2]}…{name[-(letters // 2 - 1) :]}"


def plain(value: Any) -> str:
    """Return a setting or a provenance value as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)
