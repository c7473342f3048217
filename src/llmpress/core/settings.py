"""Settings as dataclasses whose fields say what they are and what they may be, once.

What a field is stands in the class's docstring, below ``Attributes:``; what it may be in its
annotation. Both are read here: to check values however an object is made, and for the schema of
params.yaml.
"""

import functools
import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function


@dataclass(frozen=True)
class Matching:
    """An annotation of text: what it must look like.

    Attributes:
        pattern: A regular expression for the whole text.
        allowed: What that is, in words.
    """

    pattern: str
    allowed: str

    def check(self, text: str) -> str:
        """Return the text.

        Raises:
            ValueError: It does not match.
        """
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"allowed is {self.allowed}")
        return text

    def __get_pydantic_core_schema__(self, hint: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(hint))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}


@dataclass(frozen=True, init=False)
class NameOf:
    """An annotation of text: the name of an entry of one of these sections of params.yaml."""

    sections: tuple[str, ...]

    def __init__(self, *sections: str) -> None:
        object.__setattr__(self, "sections", sections)


class FolderOf(Matching):
    """An annotation of text: a folder below data/, as ``models/NAME``.

    Args:
        folders: Which ones.
    """

    def __init__(self, *folders: str) -> None:
        super().__init__(
            f"({'|'.join(folders)})/{NAME}",
            " or ".join(f"{folder}/NAME" for folder in folders) + ", a folder below data/",
        )


NAME = "[a-z0-9][a-z0-9-]*"
Name = Annotated[str, Matching(NAME, "a name of lower-case letters, digits and hyphens")]
"""Of a model, corpus, task or run: it becomes the name of folders and stages."""
Model = Annotated[str, NameOf("models", "finetuned_models")]
Corpora = Annotated[tuple[Annotated[str, NameOf("corpora")], ...], Field(min_length=1)]
Task = Annotated[str, NameOf("tasks")]
Tasks = Mapping[Task, Annotated[int, Field(ge=2)] | None]
"""Items by task, None for all; fewer than two give no standard error."""
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=2)]
"""Of a window: one at least is predicted from another."""
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Settings:
    """A base of settings whose values are checked against their annotations when they are made.

    A subclass with further checks begins its ``__post_init__`` with this one's.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)  # mypy takes no class with a __hash__ for hashable
        for name, adapter in _adapters(cls).items():
            try:
                adapter.validate_python(getattr(self, name))
            except ValidationError as error:
                raise ValueError(problem(error.errors()[0], name)) from None


def problem(error: ErrorDetails, where: str) -> str:
    """Return what pydantic found, in one line.

    Args:
        error: One of its errors.
        where: Dotted name of what was checked.
    """
    parts = [where, *(str(part) for part in error["loc"] if part != "[key]")]
    place = ".".join(part for part in parts if part)
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{place}: {message}"  # a class's own check, which names the field
    message = re.sub(r"^\w+ should ", "must ", message)
    return f"{place}: {message}, got {error['input']!r}"


def field_docs(cls: type) -> dict[str, str]:
    """Return what the ``Attributes:`` of a class and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        name = ""
        text = inspect.cleandoc(vars(base).get("__doc__") or "").partition("Attributes:\n")[2]
        for line in text.splitlines():
            if not line.strip():
                break
            if len(line) - len(line.lstrip()) <= 4:
                name, _, first = line.strip().partition(": ")
                found[name] = first
            else:
                found[name] += f" {line.strip()}"
    return found


@functools.cache
def _adapters(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(cls) if field.init}
