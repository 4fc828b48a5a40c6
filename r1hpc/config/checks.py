"""Range checks of the schema: each raises a ConfigError that names the key and what it may be."""

from typing import Any

from r1hpc.base.errors import ConfigError


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}: it must be at least {least}")


def seed(name: str, value: int) -> None:
    if not 0 <= value < 2**63:
        raise ConfigError(f"{name} is {value}: it must lie between 0 and 2^63 - 1")


def positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value}: it must be a positive number")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}")
