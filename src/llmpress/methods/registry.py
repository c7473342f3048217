"""Methods by name: each is a package here, and its name is the method's in params.yaml."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
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


def build_method(name: str, settings: Mapping[str, Any], where: str = "") -> Method:
    """Return the method ``name`` with its settings checked.

    Args:
        name: Name of a package in ``llmpress.methods``.
        settings: Its settings; ``bits`` may stand for ``num_bits``.
        where: Dotted name of the run in params.yaml, for messages.

    Raises:
        ConfigError: An unknown method, or settings it does not take.
    """
    try:
        cls = method_class(name)
    except ValueError as error:
        raise ConfigError(f"{where}.method: {error}" if where else str(error)) from None
    known = [field.name for field in fields(cls)]
    given = dict(settings)
    if "bits" in given and "bits" not in known and "num_bits" in known:
        given.setdefault("num_bits", given.pop("bits"))
    return build(cls, given, f"{where}.settings" if where else name)


def choose_method(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """Return a method that is named with its settings, or that is one already.

    Raises:
        ConfigError: As `build_method`, or settings beside a method that has its own.
    """
    if isinstance(method, str):
        return build_method(method, settings)
    if settings:
        raise ConfigError(f"{next(iter(settings))}: {method!r} has its settings already")
    return method


def check_statistics(method: Method, *, given: bool) -> None:
    """Check that a method gets the statistics it needs.

    Raises:
        ConfigError: There are none for a method that needs them.
    """
    if method.need == "needed" and not given:
        raise ConfigError(
            f"{method_name(method)} needs calibration: give some `text`, or a `calibration` "
            "(--text, --calibration)"
        )


def method_name(method: Method) -> str:
    """Return what records call a method: its package here, or its class in small letters."""
    place = f"{methods.__name__}."
    module = type(method).__module__
    if module.startswith(place):
        return module.removeprefix(place).partition(".")[0]
    return type(method).__name__.lower()
