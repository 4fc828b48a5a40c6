"""Declare ranges beside the schema's fields; loading checks them and the docs show them.

    lr: float = ranged(3e-4, above=0)

`check_ranges(config)` checks every setting; its error names the key and the allowed values. A frozen
configuration is read without it, so an old run stays readable when a range is narrowed.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest

_MOST_INTEGER = 2**63 - 1
"""The largest integer that our arrays and records can hold."""


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, or of each number of a mapping. NaN and infinity are never allowed."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    measure: Callable[[Any], float] | None = None
    """Turns a value into the number that is bounded, or refuses it."""

    def holds(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        value = self.measure(value) if self.measure else value
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        bounds = (
            *(("at least", self.least), ("above", self.above)),
            *(("at most", self.most), ("below", self.below)),
        )
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def ranged(
    default: Any = dataclasses.MISSING, *, factory: Callable[[], Any] | None = None, **bounds: Any
) -> Any:
    """Return a schema field with a Range: `least`, `above`, `most`, `below`, or `choices`."""
    metadata = {"range": Range(**bounds)}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def range_of(field: "dataclasses.Field[Any]") -> Range | None:
    """Return the range of a setting, if it has one."""
    found: Range | None = field.metadata.get("range")
    return found


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first setting that is out of its range, or that no file can hold."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
            continue
        for name, leaf in leaves(value, key):
            _check(name, leaf, range_of(field) or Range())


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every value in mappings and lists, with its dotted key."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_text(f"a name in {key}", str(name))
            yield from leaves(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, key)
    else:
        yield key, value


def _check(name: str, value: Any, allowed: Range) -> None:
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}: it must be a finite number")
    elif isinstance(value, int) and abs(value) > _MOST_INTEGER:
        raise ConfigError(f"{name} is out of range: it must lie between -2^63 and 2^63 - 1")
    if value is not None and not allowed.holds(value):
        hint = nearest(str(value), map(str, allowed.choices))
        raise ConfigError(f"{name} is {value!r}: it must be {allowed}{hint}")


def _check_text(name: str, value: str) -> None:
    """Refuse text that a path or a UTF-8 file cannot hold."""
    if "\0" in value or (not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)):
        raise ConfigError(f"{name} holds a character that no file can hold (NUL, or half of a pair)")
