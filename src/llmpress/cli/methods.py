"""``llmpress methods``: which methods there are and what they can be told."""

from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from llmpress.cli.options import AsJson


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the compression methods, or the settings of one."""
    from llmpress import known_methods
    from llmpress.cli.output import print_json, print_table

    described = [_describe(known) for known in ([name] if name else known_methods())]
    if as_json:
        print_json(described)
    elif name:
        rows = [
            [setting["name"], setting["type"], setting["default"], setting["meaning"]]
            for setting in described[0]["settings"]
        ]
        print_table(described[0]["summary"], ["setting", "type", "default", "meaning"], rows)
    else:
        rows = [[method["name"], method["calibration"], method["summary"]] for method in described]
        print_table("Methods", ["name", "calibration", "what it does"], rows)


def _describe(name: str) -> dict[str, Any]:
    import inspect

    from llmpress import method_class
    from llmpress.core.settings import field_docs

    cls = method_class(name)
    meanings = field_docs(cls)
    needs = "needed" if cls.requires_statistics else "used" if cls.uses_statistics else "not used"
    return {
        "name": name,
        "summary": (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0],
        "calibration": needs,
        "settings": [
            {
                "name": field.name,
                "type": field.type if isinstance(field.type, str) else _type_name(field.type),
                "default": "required" if field.default is MISSING else str(field.default),
                "meaning": meanings.get(field.name, ""),
            }
            for field in fields(cls)
        ],
    }


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
