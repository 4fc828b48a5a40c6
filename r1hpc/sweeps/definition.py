"""Define a sweep: the settings it varies, its points, and its folder.

    grid, fixed = read_words(["train.lr=1e-4,3e-4", "train.seed=0..2", "train.num_steps=50"])
    points_of(grid)[0].name          # lr_1e-4-seed_0

A name that is no setting is a placeholder: `lr=1e-4,3e-4` fills `{lr}` in script.args.

<run_root>/<sweep>/
    sweep.json          the job, the varied settings and all points
    shared/             the frozen code, which each point links to
    rungs/              which settings were stopped early, see telemetry.records.rungs
    <point>/            an ordinary run folder
"""

import contextlib
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.files import read_json, write_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import SWEEP, Inside, RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.rungs import Halving

_MOST_POINTS = 100_000
_ONE_LIST = "give each setting once, with its values in one list, A,B,C"
RANGES = {"log": "1e-5..1e-3", "uniform": "0.0..0.3", "int": "1..8", "log-int": "16..1024", "choice": "8,16"}
"""An example of each kind."""
_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})")
_PART = re.compile(r"""(?:\[[^]]*]|\{[^}]*}|"[^"]*"|'[^']*'|[^,])+""")
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|(?=\.\d))(\.\d*)?([eE][+-]?\d{1,3})?")
"""A number as scripts take it too: 007 is a name."""
_LONGEST_NAME = 64
Grid = dict[str, list[str]]
"""The values of each varied setting, as given."""


class Point(NamedTuple):
    """One combination of values, and the name of its run folder."""

    name: str
    settings: Mapping[str, str]


def is_setting(key: str) -> bool:
    """True for a key of the configuration, false for a placeholder."""
    return "." in key or key in RunConfig.__dataclass_fields__


def read_words(words: Sequence[str]) -> tuple[Grid, list[str]]:
    """Split KEY=VALUE words into the grid, and the overrides that are the same for all points.

    Raise UsageError if a key is given twice, a value is missing, or there are too many points.
    """
    grid: Grid = {}
    fixed = []
    for word in words:
        key, _, text = word.partition("=")
        is_one = len(_PART.findall(text)) < 2 and not _RANGE.fullmatch(text) and not is_range(text)
        if is_setting(key) and is_one:
            fixed.append(word)
        elif key in grid:
            raise UsageError(f"{printable(word)}: {_ONE_LIST}")
        else:
            grid[key] = [text] if is_range(text) else read_values(word)
    check_number(math.prod(map(len, grid.values())))
    return grid, fixed


def check_number(points: int) -> None:
    """Raise UsageError if a sweep cannot have so many points."""
    if not 0 < points <= _MOST_POINTS:
        raise UsageError(f"a sweep has from 1 to {_MOST_POINTS:,} points: give other values")


def is_range(text: str) -> bool:
    """True if the value is drawn by samples.py."""
    return text.partition(":")[0] in RANGES and ":" in text


def read_values(word: str) -> list[str]:
    """Return the values of KEY=A,B,C. Raise UsageError if one is missing, or is a range to draw from."""
    text = word.partition("=")[2]
    parts = _PART.findall(text)
    if not parts or ",".join(parts) != text:
        raise UsageError(f"{printable(word)}: {_ONE_LIST}")
    if any(map(is_range, parts)):
        raise UsageError(f"{printable(word)}: a range that is drawn stands alone, without other values")
    return list(dict.fromkeys(value for part in parts for value in _values(part)))


def _values(part: str) -> list[str]:
    ends = _RANGE.fullmatch(part)
    numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
    if ends and not numbers:
        raise UsageError(f"{part} is empty: a range goes up, {ends[2]}..{ends[1]}")
    if ends:
        check_number(len(numbers))
    return list(map(str, numbers)) if ends else [part]


@functools.cache
def same_value(key: str, text: str) -> str:
    """Return one text for all spellings of a value: of 1e-4 and 0.0001, and of true and True in a setting."""
    value: Any = text
    if is_setting(key) and not text.isdecimal():
        with contextlib.suppress(ConfigError, LookupError):  # an impossible value is refused with its point
            value = load.value_as_set(f"{key}={text}")
    if isinstance(value, float | int) and not isinstance(value, bool):
        value = str(value)
    elif is_setting(key) and not (isinstance(value, str) and key.startswith("options.")):
        return str(value) if isinstance(value, str) else repr(value)
    return str(Decimal(value).normalize() + 0) if NUMBER.fullmatch(value) else str(value)


def points_of(grid: Grid) -> list[Point]:
    """Return every combination of the values; the last setting varies fastest."""
    short = [key.rpartition(".")[2] for key in grid]
    labels = [each if short.count(each) == 1 else key for each, key in zip(short, grid, strict=True)]
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return [Point(_name(labels, settings), settings) for settings in combinations]


def groups_of(points: Sequence[Point]) -> list[list[str]]:
    """Return the names of the points of each setting, which differ in their seeds alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for point in points:
        groups.setdefault(setting_of(point), []).append(point.name)
    return list(groups.values())


def setting_of(point: Point) -> tuple[str, ...]:
    """Return the values of a point without its seeds."""
    return tuple(value for key, value in point.settings.items() if not is_seed(key))


def is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _name(labels: Sequence[str], settings: Mapping[str, str]) -> str:
    """Return a folder name that these settings always have, however many points there are."""
    text = "-".join(f"{label}_{value}" for label, value in zip(labels, settings.values(), strict=True))
    plain = re.sub(r"[^A-Za-z0-9._-]", ".", text)
    if plain == text and len(text) <= _LONGEST_NAME:
        return text
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return f"{plain[: _LONGEST_NAME - 9]}-{digest}"


@dataclass(frozen=True)
class Definition:
    """A sweep as frozen in its folder."""

    source: str
    """The job file."""
    layers: list[dict[str, Any]]
    """Its contents, the later wins."""
    overrides: list[str]
    """For every point."""
    cluster: str | None
    grids: list[Grid]
    """One for each call that added points; of a random search one for each sample."""
    rungs: Halving | None = None
    """None: every point runs to its end."""
    drawn_from: list[str] = field(default_factory=list)
    """The ranges as given, and the seed of the draws."""

    def points(self) -> list[Point]:
        """Return all points, in the order in which they were added, each under its first spelling."""
        spelled: dict[tuple[str, str], str] = {}
        points: dict[tuple[str, ...], Point] = {}
        for point in (point for grid in self.grids for point in points_of(grid)):
            settings = {
                key: spelled.setdefault((key, same_value(key, text)), text)
                for key, text in point.settings.items()
            }
            points.setdefault(tuple(settings.values()), Point(point.name, settings))
        return list(points.values())

    def spellings(self) -> list[str]:
        """Return sentences on values that are given in several spellings."""
        spellings: dict[tuple[str, str], dict[str, None]] = {}
        for grid in self.grids:
            for key, texts in grid.items():
                for text in texts:
                    spellings.setdefault((key, same_value(key, text)), {})[text] = None
        several = [(key, texts) for (key, _), texts in spellings.items() if len(texts) > 1]
        return [f"{key}: {' and '.join(texts)} are one value" for key, texts in several]


class SweepDir(ChainDir):
    """Paths of one sweep, with the lock and the supervisor's log of a chain."""

    definition = Inside(SWEEP)

    @property
    def shared(self) -> RunDir:
        return RunDir(self.path / "shared")

    def save(self, definition: Definition) -> None:
        write_json(self.definition, asdict(definition))

    def read(self) -> Definition:
        return Definition(**read_json(self.definition, Definition))
