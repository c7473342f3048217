"""One entry of `tasks` in params.yaml."""

from dataclasses import dataclass
from typing import Literal

from llmpress.core.settings import Count
from llmpress.data.sources.source import Source
from llmpress.data.tasks.arithmetic import TEST_ITEMS, TRAIN_ITEMS


@dataclass(frozen=True)
class TaskSource(Source):
    """Either a published multiple-choice set or a generated task.

    Attributes:
        files: Glob of the arrow, parquet or JSON-lines files inside the source.
        template: How a published row is read, see `llmpress.data.tasks.multiple_choice`.
        generator: Name of a generated task.
        train_items: Items to train on, of a generated task.
        test_items: Items to score, of a generated task.
    """

    files: str | None = None
    template: Literal["arc", "piqa"] | None = None
    generator: Literal["arithmetic", "calls"] | None = None
    train_items: Count = TRAIN_ITEMS
    test_items: Count = TEST_ITEMS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator and (self.files or self.template):
            raise ValueError(
                f"with {self.made_here} nothing is fetched: leave files and template out"
            )
        if not self.generator and not (self.files and self.template):
            raise ValueError("a published task needs `files:` and `template:`")

    @property
    def made_here(self) -> str | None:
        """The generator, of a generated task."""
        return f"generator {self.generator}" if self.generator else None
