"""A plain table of the page, and how a number that may be absent is shown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmpress.report.measures import NO_VALUE, is_absent

_NUMBER = re.compile(rf"[-+−]?\d.*|{NO_VALUE}|infinite|broken")


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        title: Its name for those who hear the page, and its heading where it has one.
        caption: A sentence on what it shows.
        headings: Of all columns; the first is that of the rows' names.
        rows: Their cells; the first names the row, and is linked where a run has that name.
    """

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.rows)

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone."""
        columns = zip(*self.rows, strict=True)
        return [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]


def shown(value: Any, show: Callable[[Any], str]) -> str:
    """Return a number as text, a dash where there is none."""
    return NO_VALUE if is_absent(value) else show(value)
