"""Values of a group's small YAML files, with errors that name the file, the key and the nearest right one."""

from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest, printable


def check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not among `known`."""
    names = list(known)
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {printable(str(key))!r}{nearest(str(key), names)}")


def number(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """A positive number, or None where the key is empty."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{where}: {key} is {value!r}: it must be a positive number")
    return float(value)


def text(values: Mapping[str, Any], key: str, where: str) -> str | None:
    """A string, or None where the key is empty."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: {key} is {value!r}: it must be text; put it in quotes")
    return value


def day(values: Mapping[str, Any], key: str, where: str, end: bool = False) -> float | None:
    """Unix seconds of the local midnight that begins the day, or with `end` the one that ends it."""
    value = values.get(key)
    if value is None:
        return None
    try:
        found = value if isinstance(value, date) else date.fromisoformat(str(value))
    except ValueError:
        raise ConfigError(f"{where}: {key} is {value!r}: write a day such as 2026-10-01") from None
    midnight = datetime(found.year, found.month, found.day) + timedelta(days=end)
    return midnight.timestamp()


def list_of_text(values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of strings; empty where the key is."""
    value = values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f'{where}: {key} is {value!r}: it must be a list of text, as in ["rl-*"]')
    return tuple(value)
