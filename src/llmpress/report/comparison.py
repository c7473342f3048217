"""Which of two results is better, said only where the same windows or items tell them apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmpress.evaluation.uncertainty import Difference, paired_difference
from llmpress.report.measures import Measure, Row, is_absent
from llmpress.report.pareto import dominated_by
from llmpress.report.tables import Results

FRONT = "Pareto front"
WINDOW_MEANS = {  # key of each window -> prefix of the column that is made of them
    "loss_nats": "perplexity",
    "kl_divergence_nats": "kl",
    "top1_agreement": "top1_agreement",
}


class Pairs:
    """What each number is the mean of, by run and column: of windows, or of answers."""

    def __init__(self, results: Results) -> None:
        """Collect the values that the details files keep.

        Args:
            results: What `read_results` found.
        """
        self._values: dict[tuple[str, str], tuple[str, list[float]]] = {}
        for result in results.found:
            read = result.details.get("evaluation") or {}
            how = f"{read.get('length')} tokens of "
            windows = result.details.get("windows") or {}
            for key, prefix in WINDOW_MEANS.items():
                parts = {f"{prefix}_{corpus}": means[key] for corpus, means in windows.items()}
                self._add(result.name, parts, f"mean_{prefix}", how)
            answers = result.details.get("answers") or {}
            parts = {f"accuracy_{task}": given for task, given in answers.items()}
            self._add(result.name, parts, "mean_accuracy", "items of ")

    def _add(self, run: str, parts: Mapping[str, list[float]], mean: str, how: str) -> None:
        """Add numbers and their mean, in which each corpus or task counts the same."""
        count = sum(map(len, parts.values()))
        joined: list[float] = []
        for column, values in parts.items():
            self._values[run, column] = (how + column, values)
            weight = count / (len(parts) * len(values))
            joined += [weight * value for value in values]
        self._values[run, mean] = (how + ", ".join(parts), joined)

    def difference(self, first: str, second: str, column: str) -> Difference | None:
        """Return second minus first; None where they did not read the same, or nothing is kept."""
        how, values = self._values.get((first, column), ("", []))
        same, others = self._values.get((second, column), ("", []))
        if how != same or len(values) != len(others) or not values:
            return None
        return paired_difference(values, others)

    def apart(self, first: str, second: str, column: str, level: float = 0.95) -> bool:
        """Tell whether two results differ beyond chance; what cannot be compared does not."""
        difference = self.difference(first, second, column)
        return difference is not None and difference.is_distinguishable(level)


@dataclass(frozen=True)
class Place:
    """Where a run stands among others.

    Attributes:
        better: Name of a run that is as small and better; empty on the front.
        apart: Whether the two are told apart on the same windows or items.
    """

    better: str = ""
    apart: bool = False

    @property
    def is_behind(self) -> bool:
        """Whether the run is known to be worse."""
        return bool(self.better) and self.apart

    def __str__(self) -> str:
        if not self.better:
            return f"on the {FRONT}"
        return f"{'not as good as' if self.apart else 'not told apart from'} {self.better}"


def places(runs: Sequence[Row], size: Measure, quality: Measure, pairs: Pairs) -> dict[str, Place]:
    """Return the place of every run that has both numbers, by name."""
    known = [run for run in runs if is_finite(run, size) and is_finite(run, quality)]
    points = [(float(run[size.column]), float(run[quality.column])) for run in known]
    names = [str(run["name"]) for run in known]
    return {
        name: Place()
        if index is None
        else Place(names[index], pairs.apart(name, names[index], quality.column))
        for name, index in zip(names, dominated_by(points, (size.best, quality.best)), strict=True)
    }


def is_finite(run: Row, measure: Measure) -> bool:
    """Tell whether a run has a number of that kind that can be compared."""
    value = run[measure.column]
    return not is_absent(value) and math.isfinite(value)
