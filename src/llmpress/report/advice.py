"""Which run to take at which size, as far as the same windows tell the runs apart."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmpress.evaluation.uncertainty import Difference, with_error
from llmpress.report.comparison import Pairs, is_finite
from llmpress.report.groups import Group
from llmpress.report.measures import MEAN_KL, SIZES, Row, shorten, significant

MOST_BUDGETS = 4
DISK = next(size for size in SIZES if size.column == "model_bytes")


@dataclass(frozen=True)
class Advice:
    """What to take up to one size.

    Attributes:
        budget: Bytes.
        runs: The runs to take, lowest divergence first; several where they are not told apart.
        evidence: Why, in a sentence or two.
    """

    budget: float
    runs: Sequence[Row]
    evidence: str


def advise(group: Group, pairs: Pairs) -> list[Advice]:
    """Return an advice for every size at which there are runs, from the smallest.

    The measure is the divergence from the original, the mean over the corpora. Every run that fits
    is compared with the best one in pairs of windows, at 95 % for all comparisons together.

    Args:
        group: Runs of one original.
        pairs: What their numbers are the means of.
    """
    known = [run for run in group.runs if is_finite(run, DISK) and is_finite(run, MEAN_KL)]
    found: list[Advice] = []
    for budget in _budgets([float(run["model_bytes"]) for run in known]):
        fitting = [run for run in known if run["model_bytes"] <= budget]
        working = [run for run in fitting if run["name"] not in group.broken]
        ranked = sorted(working, key=lambda run: float(run["mean_kl"]))
        if not ranked:
            names = ", ".join(str(run["name"]) for run in fitting)
            found.append(Advice(budget, (), f"No run of this size works: {names}."))
            continue
        found.append(_compare(budget, ranked, pairs))
    return found


def _compare(budget: float, ranked: Sequence[Row], pairs: Pairs) -> Advice:
    best, *others = ranked
    level = 1 - 0.05 / max(1, len(others))  # Bonferroni's
    differences = {
        str(run["name"]): pairs.difference(str(best["name"]), str(run["name"]), "mean_kl")
        for run in others
    }
    tied: list[Row] = []
    beaten: list[Row] = []
    for run in others:
        (beaten if _is_apart(differences[str(run["name"])], level) else tied).append(run)
    sentences = []
    if tied:
        more = f" and {len(tied) - 1} more" if len(tied) > 1 else ""
        sentences.append(
            f"Not told apart from {_distance(str(tied[0]['name']), differences)}{more}."
        )
    if beaten:
        rest = f", the next of {len(beaten)}," if len(beaten) > 1 else ""
        said = _distance(str(beaten[0]["name"]), differences, rest)
        sentences.append(f"Closer than {said}.")
    if not others:
        sentences.append("No other run fits.")
    return Advice(budget, (best, *tied), " ".join(sentences))


def _is_apart(difference: Difference | None, level: float) -> bool:
    return difference is not None and difference.is_distinguishable(level)


def _distance(name: str, differences: Mapping[str, Difference | None], rest: str = "") -> str:
    """Return a run's name and how much more it diverges."""
    difference, said = differences[name], f"{shorten(name)}{rest}"
    if difference is None:
        return f"{said} (not measured on the same windows)"
    if not difference.stderr > 0:
        return f"{said} by {significant(difference.mean)} nats"
    both = with_error(difference.mean, difference.stderr)
    return f"{said} by {both} nats on {difference.pairs} windows"


def _budgets(sizes: Sequence[float]) -> Iterator[float]:
    """Yield the largest of each group of similar sizes, at most `MOST_BUDGETS`."""
    ordered, apart = sorted(set(sizes)), 1.1
    while True:
        starts: list[float] = []
        for size in ordered:
            if not starts or size > apart * starts[-1]:
                starts.append(size)
        if len(starts) <= MOST_BUDGETS:
            break
        apart *= 1.1
    for start, following in zip(starts, [*starts[1:], float("inf")], strict=True):
        yield max(size for size in ordered if start <= size < following)
