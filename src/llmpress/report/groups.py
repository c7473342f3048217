"""What is compared with what: the runs of one original, weights apart from deltas."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from llmpress.report.measures import Measure, Row, is_absent, quality_measures

_WHAT = {"delta": "Deltas", "trained": "Trained on a task", "model": "Models"}


@dataclass(frozen=True)
class Group:
    """Runs that compete, and the models they are measured against.

    Attributes:
        key: Its id on the page.
        title: Its heading.
        what: ``Weights``, ``Deltas``, ``Trained on a task`` or ``Models``.
        runs: Rows of the summary.
        references: Rows of the original and, of deltas, of the base; as far as they were measured.
        columns: Of the summary, as far as some run has a number there.
    """

    key: str
    title: str
    what: str
    runs: Sequence[Row]
    references: Sequence[Row]
    columns: Sequence[str]

    @cached_property
    def original(self) -> Row | None:
        """Row of the model that the runs are compared with; None where it was not measured."""
        name = self.runs[0]["original"] if self.runs else None
        return next((row for row in self.references if row["name"] == name), None)

    @cached_property
    def working(self) -> list[Row]:
        """The runs that are not broken."""
        return [row for row in self.runs if row["name"] not in self.broken]

    @cached_property
    def rows(self) -> list[Row]:
        """References first, then runs."""
        return [*self.references, *self.runs]

    def measured(self, measures: Sequence[Measure]) -> list[Measure]:
        """Return those of the measures that some run has a number of."""
        return [measure for measure in measures if measure.column in self.columns]

    @cached_property
    def qualities(self) -> list[Measure]:
        """What is known of the runs' quality."""
        return self.measured(quality_measures(self.columns))

    @cached_property
    def headlines(self) -> list[Measure]:
        """The first of each kind of quality, and all perplexities: of these there is no mean."""
        first = {measure.group: measure for measure in reversed(self.qualities)}.values()
        return [m for m in self.qualities if m in first or m.group == "Perplexity"]

    @cached_property
    def broken(self) -> set[str]:
        """Names of runs with a number that no working run has."""
        return {
            str(row["name"])
            for row in self.runs
            if any(measure.is_broken(row, self.original) for measure in self.qualities)
        }


def find_groups(summary: pd.DataFrame) -> list[Group]:
    """Return all groups: weights, then deltas, then what was trained; last models without runs.

    Args:
        summary: One row per model and run.
    """
    models = {row["name"]: row for row in _rows(summary[summary["kind"] == "model"])}
    by_group: dict[tuple[str, str], list[Row]] = {}
    for row in _rows(summary[summary["kind"] != "model"]):
        original = "" if is_absent(row["original"]) else str(row["original"])
        by_group.setdefault((_WHAT.get(str(row["kind"]), "Weights"), original), []).append(row)
    order = ["Weights", *_WHAT.values()]
    groups: list[Group] = []
    for what, original in sorted(by_group, key=lambda pair: order.index(pair[0])):
        runs = by_group[what, original]
        names = dict.fromkeys([original, *(run["base"] for run in runs)])
        if what == "Trained on a task":  # beside what full finetuning comes to
            names |= dict.fromkeys(name for name in models if models[name]["base"] == original)
        references = [models[name] for name in names if name in models]
        of = f" of {original}" if original and what != "Trained on a task" else ""
        title = f"{what}{of}" if original else f"{what} of unknown origin"
        key = f"{what.split()[0].lower()}-{len(groups)}"
        groups.append(Group(key, title, what, runs, references, _columns(runs)))
    used = {row["name"] for group in groups for row in group.references}
    alone = [row for name, row in models.items() if name not in used]
    if alone:
        groups.append(Group("models", "Models without runs", "Models", [], alone, _columns(alone)))
    return groups


def _columns(rows: Sequence[Row]) -> list[str]:
    return [str(column) for column in rows[0] if any(not is_absent(row[column]) for row in rows)]


def _rows(frame: pd.DataFrame) -> list[Row]:
    return list(frame.to_dict("records"))
