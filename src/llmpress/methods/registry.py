"""Methods by name: each is a package here, and its name is the method's in params.yaml."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from llmpress import methods
from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.methods.base import Method

OTHERS = ("base", "registry")


def known_methods() -> list[str]:
    """Return the names of all methods, that is of all packages beside this file."""
    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name not in OTHERS)


def method_class(name: str) -> type[Method]:
    """Import the method called ``name`` and return its settings class.

    Raises:
        ValueError: An unknown name; the message suggests the nearest known one.
    """
    known = known_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"method {name!r} is unknown; {hint}known are {', '.join(known)}")
    module = importlib.import_module(f"llmpress.methods.{name}")
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Method)
        and not inspect.isabstract(member)
        and f"{member.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(found) != 1:
        raise TypeError(f"llmpress.methods.{name} defines {len(found)} methods instead of one")
    return found[0]


def known_method(name: str, where: str) -> type[Method]:
    """Return the class of the method ``name``.

    Raises:
        ConfigError: An unknown method; names the nearest known one.
    """
    try:
        return method_class(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def build_method(
    name: str, settings: Mapping[str, Any], where: str, *, section: str | None = None
) -> Method:
    """Return the method ``name`` with its settings checked.

    Args:
        name: Name of a package in ``llmpress.methods``.
        settings: Its settings.
        where: Dotted name of the run, for messages; of the method itself with ``section``.
        section: What the settings are called in messages, ``<where>.settings`` by default.

    Raises:
        ConfigError: An unknown method, or settings it does not take.
    """
    cls = known_method(name, f"{where}.method" if section is None else where)
    return build(cls, settings, f"{where}.settings" if section is None else section)
