"""Settings as dataclasses whose fields say what they are and what they may be, once.

What a field is stands in the class's docstring, below ``Attributes:``; what it may be in its
annotation. Both are read here: to check values however an object is made, and for the schema of
params.yaml.
"""

import functools
import inspect
import re
import typing
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


NAME = "[a-z0-9][a-z0-9-]*"
Name = Annotated[str, Matching(NAME, "a name of lower-case letters, digits and hyphens")]
"""Of a model, corpus, task or run: it becomes the name of folders and stages."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Settings:
    """A base of settings whose values are checked against their annotations when they are made.

    A subclass with further checks begins its ``__post_init__`` with this one's.
    """

    def __post_init__(self) -> None:
        cls: type[Any] = type(self)
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
    place = ".".join([where, *(str(part) for part in error["loc"] if part != "[key]")])
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{place}: {message}"  # a class's own check, which names the field
    message = message.replace("Input should be", "must be").replace("String should", "must")
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
