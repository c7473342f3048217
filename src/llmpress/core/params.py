"""params.yaml as checked values: sections looked up by dotted name, settings as frozen dataclasses.

Every mistake becomes one line that names the key and, where there is one, the nearest known key.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from llmpress.core.errors import ConfigError
from llmpress.core.failures import one_line
from llmpress.core.settings import problem

T = TypeVar("T")

SECTIONS = (
    *("seed", "models", "corpora", "tasks", "finetuned_models", "deltas", "calibrations", "runs"),
    *("delta_runs", "finetunes", "trainings", "peers", "evaluation", "speed"),
)
"""Of params.yaml; all but ``seed``, ``evaluation`` and ``speed`` map names to settings."""


def read_params(path: Path) -> dict[str, Any]:
    """Read a params.yaml.

    Raises:
        ConfigError: The file is missing, is not YAML, or its sections are no mappings.
    """
    try:
        params = yaml.load(path.read_text(encoding="utf-8"), _OncePerName)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: run from the project's root or name it with --params"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(params, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(params).__name__}")
    _check_sections(params)
    return params


class _OncePerName(yaml.SafeLoader):
    """Refuses a name that stands twice in a mapping, of which YAML's last would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise ConfigError(f"{name!r} stands twice, again in line {line}: rename one")
        return super().construct_mapping(node, deep)


def section(params: Mapping[str, Any], dotted: str) -> Any:
    """Look up ``runs.cluscomp-3bit.settings`` and the like.

    Raises:
        ConfigError: A part of the name does not exist; the nearest known key is suggested.
    """
    value: Any = params
    seen = ""
    for part in dotted.split("."):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{seen} in params.yaml is a plain value, it has no {part!r}")
        if part not in value:
            known = [str(key) for key in value]
            raise ConfigError(f"{seen or 'params.yaml'} has no {part!r}{suggestion(part, known)}")
        value = value[part]
        seen = f"{seen}.{part}" if seen else part
    return value


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a settings object out of a mapping, checking every key and type.

    Args:
        cls: A frozen standard-library dataclass; a ``ValueError`` of its ``__post_init__`` becomes
            part of the message.
        values: What params.yaml says.
        where: Dotted name of the mapping, for the message.

    Raises:
        ConfigError: An unknown or missing key, a wrong type, or a value the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, not {values!r}")
    _refuse_unknown_keys(cls, values, where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(problem(item, where) for item in error.errors())) from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'?``, or the known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known are {', '.join(known)}" if known else ""


def _check_sections(params: Mapping[str, Any]) -> None:
    for name, entries in params.items():
        if name not in SECTIONS:
            raise ConfigError(f"params.yaml has no section {name!r}{suggestion(name, SECTIONS)}")
        if name == "seed":
            continue
        if not isinstance(entries, dict):
            raise ConfigError(
                f"{name} in params.yaml must be a mapping, not {entries!r}: leave it out when it "
                "is empty"
            )
        for key, settings in {} if name in ("evaluation", "speed") else entries.items():
            if not isinstance(settings, dict):
                raise ConfigError(f"{name}.{key} must be a mapping of settings, not {settings!r}")
    models = params.get("evaluation", {}).get("models") or []
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise ConfigError("evaluation.models in params.yaml must be a list of names")


def _refuse_unknown_keys(hint: Any, value: Any, where: str) -> None:
    """Check what pydantic lets pass: unknown keys at every depth, and true for a number."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = typing.get_type_hints(hint)
        known = {field.name: hints[field.name] for field in dataclasses.fields(hint) if field.init}
        for key, item in value.items():
            if key not in known:
                name = where or "params.yaml"
                raise ConfigError(f"{name} has no setting {key!r}{suggestion(str(key), known)}")
            _refuse_unknown_keys(known[key], item, f"{where}.{key}".lstrip("."))
        return
    if isinstance(value, bool) and hint in (int, float):
        raise ConfigError(f"{where}: must be a number, got {value!r}")
    if isinstance(value, list):  # tuple[X, ...] or list[X]
        children = [(f"{where}.{index}", item) for index, item in enumerate(value)]
    elif isinstance(value, Mapping) and typing.get_origin(hint) in (dict, Mapping):
        children = [(f"{where}.{key}", item) for key, item in value.items()]
    else:  # X | None
        children = [(where, value)]
    for argument in typing.get_args(hint):
        for place, child in children:
            _refuse_unknown_keys(argument, child, place)


def check_same(
    names: tuple[str, ...], where: str, entry: object, other_name: str, other: object
) -> None:
    """Refuse an entry that says another thing than the one it refers to."""
    for name in names:
        ours, theirs = getattr(entry, name), getattr(other, name)
        if ours != theirs:
            raise ConfigError(f"{where}.{name} is {ours!r}, but {other_name} has {theirs!r}")
