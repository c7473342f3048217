"""How well a mean over windows or items is known, and whether two results differ at all.

Two models read the same windows and answer the same items, so they are compared pair by pair: what
makes a window or an item hard for both cancels, and their difference is known much better than
either number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        mean: Of second minus first.
        stderr: Its standard error; NaN for a single pair.
        pairs: How many there are.
    """

    mean: float
    stderr: float
    pairs: int

    def is_distinguishable(self, level: float = 0.95) -> bool:
        """Tell whether 0 lies outside the interval of confidence, by Student's t."""
        if self.pairs < 2:
            return False
        from scipy.special import stdtrit

        reach = float(stdtrit(self.pairs - 1, (1 + level) / 2)) * self.stderr
        return abs(self.mean) > reach


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two results on the same windows or items.

    Of answers, right (1) or wrong (0), only those count that the two do not share, as in McNemar's
    test.

    Raises:
        ValueError: Not as many of one as of the other, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values make no pairs")
    differences = [after - before for before, after in zip(first, second, strict=True)]
    return Difference(fmean(differences), standard_error(differences), len(differences))


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """Return ``0.341 ± 0.029``: two digits of the error, as many decimals of both.

    Args:
        value: The number.
        error: Its standard error; None or 0 for a number alone.
        sign: ``+`` to show the sign of any number.
    """
    if not error:
        return f"{value:{sign}.4g}".replace("-", "−")
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign},.{digits}f} ± {error:,.{digits}f}".replace("-", "−")
