"""GPU-seconds by local day, in integers, for as many allocations as there are.

    days = Days()
    days.add(starts, seconds, gpus)      # arrays
    days.totals()                        # {"2026-09-21": 440640, "2026-09-22": 279360}

A whole day in the middle of an allocation costs nothing: only the number of GPUs that changes at its ends
is kept. A day has 23 or 25 hours where the clock is changed.
"""

from datetime import datetime

import numpy as np

from r1hpc.accounting.cells import Ints
from r1hpc.telemetry.hours import midnight_before


class Days:
    """Sums that grow with the days they are about, not with the allocations."""

    def __init__(self) -> None:
        self._midnights = np.zeros(0, np.int64)
        """Ascending and without a gap. Day i is the one that ends at midnight i; there is no day 0."""
        self._within = np.zeros(1, np.int64)
        """GPU-seconds of the days on which an allocation began or ended."""
        self._change = np.zeros(1, np.int64)
        """By how many the GPUs that were held for the whole day i differ from those of the day before."""

    def add(self, starts: Ints, seconds: Ints, gpus: Ints, sign: int = 1) -> None:
        """Count allocations of `gpus` that began at `starts` (Unix seconds); sign -1 takes them away."""
        if not len(starts):
            return
        ends, gpus = starts + seconds, sign * gpus
        self._cover(int(starts.min()), int(ends.max()))
        days = np.searchsorted(self._midnights, starts, "right")
        left = self._midnights[days] - starts
        long = np.flatnonzero(seconds > left)
        np.add.at(self._within, days, gpus * np.minimum(seconds, left))
        first, end, count = days[long], ends[long], gpus[long]
        last = np.searchsorted(self._midnights, end, "right")
        np.add.at(self._within, last, count * (end - self._midnights[last - 1]))
        np.add.at(self._change, first + 1, count)
        np.add.at(self._change, last, -count)

    def totals(self) -> dict[str, int]:
        """YYYY-MM-DD: GPU-seconds, of the days on which a GPU was held."""
        if not len(self._midnights):
            return {}
        held = np.cumsum(self._change)[1:-1]
        totals = self._within[1:-1] + held * np.diff(self._midnights)
        return {
            datetime.fromtimestamp(self._midnights[day]).date().isoformat(): int(totals[day])
            for day in np.flatnonzero(totals)
        }

    def _cover(self, first: int, last: int) -> None:
        known = [int(moment) for moment in self._midnights] or [midnight_before(first)]
        earlier: list[int] = []
        while (earlier or known)[-1 if earlier else 0] > first:
            earlier.append(midnight_before((earlier or known)[-1 if earlier else 0] - 1))
        later: list[int] = []
        while (later or known)[-1] <= last:
            later.append(midnight_before((later or known)[-1], 1))
        if earlier or later or not len(self._midnights):
            self._midnights = np.array([*reversed(earlier), *known, *later], np.int64)
            size = len(self._midnights) + 1
            self._within = _moved(self._within, len(earlier), size)
            self._change = _moved(self._change, len(earlier), size)


def _moved(values: Ints, shift: int, size: int) -> Ints:
    moved = np.zeros(size, np.int64)
    moved[shift : shift + len(values)] = values
    return moved
