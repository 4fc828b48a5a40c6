"""Document every setting with its type, default and meaning, from the schema's source.

A field's meaning is the string below it in the schema; a class docstring describes its section.
"""

import ast
import dataclasses
import inspect
import textwrap
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from r1hpc.config.schema.ranges import range_of
from r1hpc.config.schema.run import RunConfig, section_of

_HEAD = """# Settings

Every key that a job file, a preset in `configs/` or `KEY=VALUE` on the command line may set. Made from the
schema by `python -m r1hpc.settings --reference`. What a run would have, and which file or flag each value
came from: `python -m r1hpc.settings JOB.yaml [KEY=VALUE …]`.

"""


_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    list: "list",
    dict: "mapping",
    NoneType: "null",
}


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
    """Return the type, with its range if it has one."""
    allowed = range_of(field)
    if allowed is None:
        return _type(field.type)
    if allowed.choices and field.type is str:
        return ", ".join(f"`{each}`" for each in allowed.choices)
    return f"{_type(field.type)}, {allowed}"


def _type(annotation: Any) -> str:
    """Return the type in plain words: `whole number or null`, `mapping`, the values of an enum."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{each.value}`" for each in annotation)
    origin = get_origin(annotation)
    if origin in _TYPES:
        return _TYPES[origin]
    return " or ".join(_TYPES[part] for part in get_args(annotation) or (annotation,))


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
