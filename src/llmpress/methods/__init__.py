"""Compression methods, a package each; its name is the method's name in params.yaml.

May import from core up to numerics.
"""

import difflib
import importlib
import inspect
import pkgutil

from llmpress.methods.base import Method


def known_methods() -> list[str]:
    """Return the names of all methods, that is of all packages here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


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
