"""Sum GPU-hours by several keys at once for `report --by`, with the starts of each group and their waits.

    {"user": "ada", "month": "2026-05", "gpu_hours": 12.5, "share": 0.25, "starts": 3,
     "wait_p50_s": 60.0, "wait_p90_s": 900.0}

An allocation is split at the ends of days or months, and by GPU type, so the parts add up to the total. It
starts once: in the group of its first part, if that lies in the selected period.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from r1hpc.accounting.cells import Ints
from r1hpc.accounting.hours import UNKNOWN, Selection, cause_of

Block = dict[str, Ints]
"""Columns with a number for each record: job, start, seconds, gpus, nodes, billing, run, a code for each key,
with `--by` also `eligible`, 0 if unknown.

`job` is the 64-bit hash of cluster and id; `gpus` are in units of a GPU.
"""
NO_GPU = "none"
_TIMES = ("day", "month")
_NO_WAIT, _NO_START = -1, -2
"""Waits of a start with unknown times, and of what is no start."""
_COLUMNS = {"cause": "state", "stage": "run"}
"""The column of a block that has the numbers of a key, if its name is another."""


class Groups:
    """Parts of the added allocations: the group, seconds x units of a GPU, and the wait of a start."""

    def __init__(self, names: Mapping[str, Sequence[Any]], selection: Selection, midnights: Ints) -> None:
        """`names` has for each column of a block what its numbers stand for."""
        self._selection, by = selection, selection.by
        days = [datetime.fromtimestamp(midnight).date() for midnight in midnights]
        ends = (0, len(days) - 1)
        if "day" not in by:  # months, or one period
            kept = [at for at, day in enumerate(days) if at in ends or (day.day == 1 and "month" in by)]
            midnights, days = midnights[kept], [days[at] for at in kept]
        self._bounds = midnights
        mixes = [mix or ((NO_GPU, 0),) for mix in names["gpu_type"]]
        types = [(kind or UNKNOWN, units) for mix in mixes for kind, units in mix]
        self._num_types = np.array([len(mix) for mix in mixes])
        self._first_type = np.cumsum(self._num_types) - self._num_types
        self._units = np.array([units for _, units in types])
        texts = {
            **names,
            "cause": [cause_of(state) for state in names["state"]],
            "day": [day.isoformat() for day in days],
            "month": [day.isoformat()[:7] for day in days],
            "gpu": [kind for kind, _ in types],
        }
        keys = (np.unique(np.array(texts[key], object), return_inverse=True) for key in by)
        self._names, self._numbers = zip(*keys, strict=True)
        self._parts: list[tuple[Any, ...]] = [(np.zeros(0, np.int64),) * 3]

    def add(self, block: Block, chosen: Ints, begin: Ints, held: Ints) -> None:
        """Add the rows `chosen` of a block, which held their GPUs for `held` seconds from `begin`."""
        rows, later, period, seconds = split_at(self._bounds, begin, begin + held)
        mix = block["gpu_type"][chosen][rows]
        again, nth_type = _repeated(self._num_types[mix])
        rows, period, kind = rows[again], period[again], self._first_type[mix][again] + nth_type
        columns = {"day": period, "month": period, "gpu": kind}
        codes = [
            numbers[columns[key] if key in columns else block[_COLUMNS.get(key, key)][chosen][rows]]
            for key, numbers in zip(self._selection.by, self._numbers, strict=True)
        ]
        group = np.ravel_multi_index(codes, [len(names) for names in self._names])
        start, eligible = (block[name][chosen].astype(np.int64) for name in ("start", "eligible"))
        wait = np.where(eligible > 0, np.maximum(start - eligible, _NO_WAIT), _NO_WAIT)[rows]
        is_start = (later[again] + nth_type == 0) & (start >= (self._selection.start or 0))[rows]
        self._parts.append((group, seconds[again] * self._units[kind], np.where(is_start, wait, _NO_START)))

    def to_hours(self, unit: int) -> dict[str, Any]:
        """Return {by, groups, all}: the keys, the groups, ranked, and their sum; a GPU has `unit` units."""
        group, *parts = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        groups, numbers = np.unique(group, return_inverse=True)
        places = np.unravel_index(groups, [len(names) for names in self._names])
        by = self._selection.by
        keys = {key: names[at] for key, names, at in zip(by, self._names, places, strict=True)}
        rows = self._sums(keys, numbers, len(groups), unit, *parts)
        total = self._sums({}, np.zeros_like(numbers), 1, unit, *parts)[0]
        return {"by": list(by), "groups": _ranked(by, rows), "all": total}

    def _sums(
        self, columns: dict[str, Any], numbers: Ints, count: int, unit: int, held: Ints, wait: Ints
    ) -> list[dict[str, Any]]:
        """Return the rows of `count` groups, with `columns` before; `numbers`: the group of each part."""
        hours = np.bincount(numbers, held, count) / unit / 3600
        columns |= {"gpu_hours": hours, "share": hours / (hours.sum() or 1.0)}
        columns["starts"] = np.bincount(numbers[wait > _NO_START], minlength=count)
        waited = np.flatnonzero(wait > _NO_WAIT)
        ends = np.cumsum(np.bincount(numbers[waited], minlength=count))
        waits = np.split(wait[waited[np.argsort(numbers[waited])]], ends[:-1])
        for name, share in (("wait_p50_s", 0.5), ("wait_p90_s", 0.9)):
            shares = [np.quantile(part, share) if len(part) else None for part in waits[:count]]
            columns[name] = np.array(shares, object)
        lists = [values.tolist() for values in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _ranked(by: Sequence[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by the hours of the first key, then by date, then by hours; a first key of dates by date."""
    hours: dict[str, float] = defaultdict(float)
    for row in rows:
        hours[row[by[0]]] += 0 if by[0] in _TIMES else row["gpu_hours"]
    times = [key for key in by if key in _TIMES]
    return sorted(
        rows,
        key=lambda row: (-hours[row[by[0]]], row[by[0]], [row[key] for key in times], -row["gpu_hours"]),
    )


def split_at(bounds: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return the parts of times between bounds: row, number of the part in it, period, and seconds."""
    first = np.searchsorted(bounds, begin, "right") - 1
    last = np.maximum(np.searchsorted(bounds, end, "left") - 1, first)
    rows, later = _repeated(last - first + 1)
    period = first[rows] + later
    seconds = np.minimum(end[rows], bounds[period + 1]) - np.maximum(begin[rows], bounds[period])
    return rows, later, period, seconds


def _repeated(counts: Ints) -> tuple[Ints, Ints]:
    """Return each index as often as `counts` has it, and the number of each among its equals."""
    indices = np.repeat(np.arange(len(counts)), counts)
    return indices, np.arange(len(indices)) - (np.cumsum(counts) - counts)[indices]
