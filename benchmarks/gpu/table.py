"""Keep the tables of a piece: figures, as JSON until the page is made of them.

save(folder, Result("speed", "...", 61.0, (Table("MFU", ("model", "MFU"), (("0.5B", "41 %"),)),), facts))
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from r1hpc.base.errors import StateError
from r1hpc.base.files import read_json, write_json


@dataclass(frozen=True)
class Table:
    """Figures under a title; `notes` say how they came about and what they do not say."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A piece that was run."""

    piece: str
    command: str
    seconds: float
    tables: tuple[Table, ...]
    facts: Mapping[str, str]
    """Card, driver and versions: what the figures are of."""
    failure: str = ""
    """Why it did not end as it should; empty: it did."""


def save(folder: Path, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{result.piece}.json", asdict(result), mode=0o644)


def load(folder: Path, piece: str) -> Result | None:
    """Return the table that a piece left there; None: it has not run, or the file is damaged."""
    try:
        value = read_json(folder / f"{piece}.json", Result)
    except (FileNotFoundError, StateError):
        return None
    tables = tuple(
        Table(
            each["title"],
            tuple(each["header"]),
            tuple(map(tuple, each["rows"])),
            tuple(each.get("notes", ())),
        )
        for each in value["tables"]
    )
    return Result(**{**value, "tables": tables})


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
