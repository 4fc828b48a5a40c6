"""Describe job files as JSON Schema, so that editors complete and check them."""

import dataclasses
import json
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from r1hpc.config.reference import meanings
from r1hpc.config.schema.ranges import range_of
from r1hpc.config.schema.run import RunConfig, section_of
from r1hpc.config.stages import STAGES

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", list: "array"}
_BOUNDS = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum", "below": "exclusiveMaximum"}
_STRINGS = {"type": "array", "items": {"type": "string"}}


def as_text() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the schema of a job file: of one run, or of a chain with `stages`."""
    run = _section(RunConfig)
    sections = {name: shape for name, shape in run["properties"].items() if "properties" in shape}
    run["properties"] |= {name: {"$ref": f"#/definitions/{name}"} for name in sections}
    include = {**_STRINGS, "description": "Presets in configs/, or files; the later wins."}
    run["properties"] = {"include": include, **run["properties"]}
    run["properties"]["stage"]["examples"] = list(STAGES)
    names = {"name": {"type": "string"}, "needs": {**_STRINGS, "description": "Stages that come before it."}}
    stage = {**run, "properties": {**names, **run["properties"]}, "required": ["name"]}
    stages = {"type": "array", "items": stage, "description": "A chain: each stage is a job of its own."}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "r1hpc job file",
        **run,
        "properties": {**run["properties"], "stages": stages},
        "definitions": sections,
    }


def _section(schema: type) -> dict[str, Any]:
    said = meanings(schema)
    fields = {}
    for each in dataclasses.fields(schema):
        section = section_of(each)
        fields[each.name] = _section(section) if section else _setting(each, said.get(each.name, ""))
    return {
        "type": ["object", "null"],
        "description": " ".join((schema.__doc__ or "").split()),
        "properties": fields,
        "additionalProperties": False,
    }


def _setting(field: "dataclasses.Field[Any]", meaning: str) -> dict[str, Any]:
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
