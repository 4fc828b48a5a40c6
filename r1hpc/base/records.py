"""Check a value from a JSON file against the type that declares it (its shape); describe the first mistake.

    class Begin(TypedDict):
        attempt: Count
        gpus: NotRequired[Count]

    mistake({"attempt": "two"}, Begin)      # "attempt is 'two', not a whole number"
    mistake({"attempt": 2, "new": 1}, Begin)     # None: keys of another version are no mistake

base/files.py checks records against the shape that its caller gives. A shape is a dataclass, a TypedDict, a
NamedTuple, or a type such as `Count`. A kill, a full disk, another program or a person may have written the
file, so a number may be text, infinite, or have 5,000 digits. Values that pass can be added up.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from itertools import repeat
from typing import Annotated, Any, NamedTuple

from r1hpc.base.names import printable

Check = Callable[[Any], str | None]
"""Returns the mistake, to follow the value's name (" is 'two', not a number"), or None."""
_MOST_SHOWN = 40
_LARGEST = 2**63
_MISSING = dataclasses.MISSING


class Between(NamedTuple):
    """The range of a number, both ends included, without NaN."""

    low: float
    high: float


Count = Annotated[int, Between(0, 2**53)]
Finite = Annotated[float, Between(-1e300, 1e300)]
Amount = Annotated[float, Between(0, 1e300)]
Time = Annotated[float, Between(0, 7_258_118_400)]
"""Unix seconds, until the year 2200: a larger number is no time of a run."""
Duration = Annotated[float, Between(0, 1e10)]
"""Seconds."""


def mistake(value: Any, shape: Any) -> str | None:
    """Describe the first mistake in a value from a JSON file; None if it has the shape."""
    said = check_of(shape)(value)
    return None if said is None else said.removeprefix(".").strip()


@functools.cache
def check_of(shape: Any) -> Check:
    """Return the check of a shape, made once."""
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any or shape is object:
        return lambda value: None
    if shape is None or shape is type(None):
        return lambda value: None if value is None else _not(value, "null")
    if origin is Annotated:
        return _in_range(check_of(arguments[0]), arguments[1])
    if origin in (typing.Union, types.UnionType):
        checks = [check_of(each) for each in arguments if each is not type(None)]
        return _any_of(checks, type(None) in arguments)
    if origin is typing.Literal:
        return _one_of(arguments)
    if origin is typing.NotRequired:
        return check_of(arguments[0])
    if origin in (list, Sequence, tuple) and len({*arguments} - {...}) == 1:
        return _list_of(repeat(check_of(arguments[0])))
    if origin in (dict, Mapping):
        return _mapping_of(check_of(arguments[1]))
    shape = origin or shape
    if shape in _PLAIN:
        return _PLAIN[shape]
    if issubclass(shape, Enum):
        return _one_of([each.value for each in shape])
    hints = typing.get_type_hints(shape, include_extras=True)
    if dataclasses.is_dataclass(shape):
        required = {f.name for f in dataclasses.fields(shape) if f.default is f.default_factory is _MISSING}
        return _object(hints, required)
    if typing.is_typeddict(shape):
        return _object(hints, shape.__required_keys__)
    assert issubclass(shape, tuple), f"{shape} is no shape"
    return _list_of([check_of(hint) for hint in hints.values()], len(hints))


def _boolean(value: Any) -> str | None:
    return None if value is True or value is False else _not(value, "true or false")


def _whole(value: Any) -> str | None:
    if value.__class__ is int and -_LARGEST <= value < _LARGEST:
        return None
    return _not(value, "a whole number")


def _number(value: Any) -> str | None:
    return None if value.__class__ is float or _whole(value) is None else _not(value, "a number")


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return _not(value, "text")
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no terminal or file accepts
        return " is text that is not Unicode"
    return None


_PLAIN: dict[Any, Check] = {bool: _boolean, int: _whole, float: _number, str: _text}


def _in_range(check: Check, limits: Between) -> Check:
    low, high = limits
    usual = (float, int) if check is _number else (int,)

    def checked(value: Any) -> str | None:
        if value.__class__ in usual and low <= value <= high:  # nearly all; there may be millions
            return None
        said = check(value)
        if said is None and not low <= value <= high:
            return f" is {_shown(value)}, which cannot be"
        return said

    return checked


def _any_of(checks: Sequence[Check], takes_none: bool) -> Check:
    if len(checks) == 1:
        only = checks[0]
        return lambda value: None if value is None else only(value)

    def checked(value: Any) -> str | None:
        if value is None and takes_none:
            return None
        first = checks[0](value)
        if first is None or any(check(value) is None for check in checks[1:]):
            return None
        return first

    return checked


def _one_of(known: Sequence[Any]) -> Check:
    def checked(value: Any) -> str | None:
        if isinstance(value, str) and value in known:
            return None
        return _not(value, f"one of {', '.join(map(str, known))}")

    return checked


def _list_of(checks: Iterable[Check], length: int | None = None) -> Check:
    """Return the check of a list: one check for each item, and its length if that is given."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return _not(value, "a list" if length is None else f"a list of {length}")
        for number, (check, item) in enumerate(zip(checks, value, strict=False)):
            if (problem := check(item)) is not None:
                return f"[{number}]{problem}"
        return None

    return checked


def _mapping_of(check: Check) -> Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return _not(value, "an object")
        for key, each in value.items():
            if (said := check(each)) is not None:
                return f".{_shown(key)}{said}"
        return None

    return checked


def _object(hints: Mapping[str, Any], required: Collection[str]) -> Check:
    checks = [(name, check_of(hint), name in required) for name, hint in hints.items()]

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return _not(value, "an object")
        for name, check, is_required in checks:
            each = value.get(name, _MISSING)
            if each is _MISSING:
                if is_required:
                    return f".{name} is missing"
            elif (said := check(each)) is not None:
                return f".{name}{said}"
        return None

    return checked


def _not(value: Any, wanted: str) -> str:
    return f" is {_shown(value)}, not {wanted}"


def _shown(value: Any) -> str:
    """Return a value as text, shortened; Python cannot print a number of thousands of digits."""
    if value.__class__ is int and not -_LARGEST <= value < _LARGEST:
        return "a number of too many digits"
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    text = printable(value if isinstance(value, str) else repr(value))
    text = text.encode(errors="replace").decode().replace("\n", "\\n")
    short = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
    return f"'{short}'" if isinstance(value, str) else short
