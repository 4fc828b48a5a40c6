"""Document every setting with its type, default and meaning: as a page, and as JSON Schema for editors.

A field's meaning is the string below it in the schema's source; a class docstring describes its section.
"""

import ast
import dataclasses
import inspect
import json
import textwrap
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from r1hpc.config.schema.ranges import range_of
from r1hpc.config.schema.run import RunConfig, section_of
from r1hpc.config.stages import STAGES

_HEAD = """# Settings

Every key that a job file, a preset in `configs/` or `KEY=VALUE` on the command line may set. Made from the
schema by `python -m r1hpc.settings --reference`. What a run would have, and which file or flag each value
came from: `python -m r1hpc.settings JOB.yaml [KEY=VALUE …]`.

"""
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
"""In JSON Schema."""
_WORDS = {
    "string": "text",
    "integer": "whole number",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}
_BOUNDS = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum", "below": "exclusiveMaximum"}
_STRINGS = {"type": "array", "items": {"type": "string"}}


def reference() -> str:
    """Return all sections as one page of Markdown."""
    sections = [_section(cls, prefix) for prefix, cls in _sections(RunConfig)]
    return _HEAD + "\n".join(sections)


def _sections(schema: type, prefix: str = "") -> list[tuple[str, type]]:
    found = [(prefix, schema)]
    for each in dataclasses.fields(schema):
        section = section_of(each)
        found += _sections(section, f"{prefix}{each.name}.") if section else []
    return found


def _section(schema: type, prefix: str) -> str:
    said = meanings(schema)
    title = f"`{prefix.removesuffix('.')}`" if prefix else "The run"
    purpose = " ".join(inspect.cleandoc(schema.__doc__ or "").split())
    rows = [
        f"| `{prefix}{each.name}` | {_kind(each)} | {_default(each)} | {said.get(each.name, '')} |"
        for each in dataclasses.fields(schema)
        if section_of(each) is None
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {title}", "", purpose, "", *table, ""])


def meanings(schema: type) -> dict[str, str]:
    """Return the string below each field, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = _cell(" ".join(str(below.value.value).split()))
    return found


def _kind(field: "dataclasses.Field[Any]") -> str:
    """Return the type and its range in words, `whole number or null, at least 1`; or the possible values."""
    allowed, shape = range_of(field), _shape(field.type)
    choices = shape.get("enum") or (allowed.choices if allowed and field.type is str else ())
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    names = [shape["type"]] if isinstance(shape["type"], str) else shape["type"]
    words = " or ".join(_WORDS.get(name, name) for name in names)
    return f"{words}, {allowed}" if allowed else words


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return _cell(f"`{value.value if isinstance(value, Enum) else value}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def schema_text() -> str:
    """Return the JSON Schema of a job file, of one run or of a chain with `stages`, as text."""
    run = _schema_section(RunConfig)
    sections = {name: shape for name, shape in run["properties"].items() if "properties" in shape}
    run["properties"] |= {name: {"$ref": f"#/definitions/{name}"} for name in sections}
    include = {**_STRINGS, "description": "Presets in configs/, or files; the later wins."}
    run["properties"] = {"include": include, **run["properties"]}
    run["properties"]["stage"]["examples"] = list(STAGES)
    names = {"name": {"type": "string"}, "needs": {**_STRINGS, "description": "Stages that come before it."}}
    stage = {**run, "properties": {**names, **run["properties"]}, "required": ["name"]}
    stages = {"type": "array", "items": stage, "description": "A chain: each stage is a job of its own."}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "r1hpc job file",
        **run,
        "properties": {**run["properties"], "stages": stages},
        "definitions": sections,
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _schema_section(schema: type) -> dict[str, Any]:
    said = meanings(schema)
    fields = {}
    for each in dataclasses.fields(schema):
        section, meaning = section_of(each), said.get(each.name, "")
        fields[each.name] = _schema_section(section) if section else _schema_setting(each, meaning)
    return {
        "type": ["object", "null"],
        "description": " ".join((schema.__doc__ or "").split()),
        "properties": fields,
        "additionalProperties": False,
    }


def _schema_setting(field: "dataclasses.Field[Any]", meaning: str) -> dict[str, Any]:
    allowed, shape = range_of(field), _shape(field.type)
    if allowed is not None:
        limits = {word: getattr(allowed, name) for name, word in _BOUNDS.items()}
        limits = {word: limit for word, limit in limits.items() if limit is not None}
        if allowed.choices:
            limits["enum"] = [*allowed.choices, *([None] if "null" in shape["type"] else [])]
        inner = {"array": "items", "object": "additionalProperties"}.get(str(shape["type"]))
        shape = {**shape, inner: limits} if inner else {**shape, **limits}
    if field.default is not dataclasses.MISSING:
        shape["default"] = field.default.value if isinstance(field.default, Enum) else field.default
    return {**shape, "description": meaning} if meaning else shape


def _shape(annotation: Any) -> dict[str, Any]:
    if annotation is Any:
        return {}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"enum": [each.value for each in annotation]}
    if get_origin(annotation) is dict:
        return {"type": "object"}
    if get_origin(annotation) is list:
        return {"type": "array", "items": _shape(get_args(annotation)[0])}
    parts = [_shape(part) for part in get_args(annotation)]
    if not parts:
        return {"type": _TYPES[annotation]}
    return {"type": [part["type"] for part in parts]} if all("type" in part for part in parts) else {}
