"""The JSON schema of params.yaml, made of the classes that check it and of their docstrings."""

import inspect
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import DataclassSchema, DictSchema

from llmpress.core.settings import field_docs
from llmpress.methods.registry import known_methods, method_class
from llmpress.pipeline.params import Params


def params_schema() -> dict[str, Any]:
    """Return the schema, draft 2020-12; settings depend on the method that they are of."""
    schema = _schema(Params)
    methods = {name: _schema(method_class(name)) for name in known_methods()}
    for entry in ("Run", "DeltaRun"):
        definition = schema["$defs"][entry]
        definition["properties"]["method"]["enum"] = list(methods)
        definition["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}},
                "then": {"properties": {"settings": {"$ref": f"#/$defs/{name}"}}},
            }
            for name in methods
        ]
    schema["$defs"] |= methods
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _WithDocs(GenerateJsonSchema):
    """Closed objects, described by their docstrings."""

    def dataclass_schema(self, schema: DataclassSchema) -> dict[str, Any]:
        """Return the schema of one class."""
        found = super().dataclass_schema(schema)
        cls, docs = schema["cls"], field_docs(schema["cls"])
        for name, child in found["properties"].items():
            child.pop("title", None)
            child["description"] = docs[name].replace("``", "`")
        summary = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("``", "`")
        return {**found, "description": " ".join(summary.split()), "additionalProperties": False}

    def dict_schema(self, schema: DictSchema) -> dict[str, Any]:
        """Return the schema of a mapping; keys that match no pattern are refused."""
        found = super().dict_schema(schema)
        return found | ({"additionalProperties": False} if "patternProperties" in found else {})


def _schema(cls: type[Any]) -> dict[str, Any]:
    return TypeAdapter(cls).json_schema(schema_generator=_WithDocs)
