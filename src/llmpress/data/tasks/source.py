"""One entry of `tasks` in params.yaml."""

from dataclasses import dataclass
from typing import Literal

from llmpress.data.sources.location import Location
from llmpress.data.tasks.arithmetic import TEST_ITEMS, TRAIN_ITEMS


@dataclass(frozen=True)
class TaskSource:
    """Either a published multiple-choice set or a generated task.

    Attributes:
        license: SPDX name of the data's licence.
        package: See `llmpress.data.sources.location.Location`, as are ``hub`` and ``path``.
        files: Glob of the arrow, parquet or JSON-lines files inside the source.
        template: How a published row is read, see `llmpress.data.tasks.multiple_choice`.
        generator: Name of a generated task.
        train_items: Items to train on, of a generated task.
        test_items: Items to score, of a generated task.
    """

    license: str
    package: str | None = None
    hub: str | None = None
    path: str | None = None
    files: str | None = None
    template: Literal["arc", "piqa"] | None = None
    generator: Literal["arithmetic", "calls"] | None = None
    train_items: int = TRAIN_ITEMS
    test_items: int = TEST_ITEMS

    def __post_init__(self) -> None:
        published = self.package or self.hub or self.path or self.files or self.template
        if self.generator and published:
            raise ValueError("a generator takes no package, hub, path, files or template")
        if not self.generator:
            self.location()
            if not (self.files and self.template):
                raise ValueError("a published task needs `files:` and `template:`")

    def location(self) -> Location:
        """Where a published task is fetched from."""
        return Location(self.package, self.hub, self.path)
