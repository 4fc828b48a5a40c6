"""Simulate sweeps with rungs on real files: intervals hold the truth, and the best setting survives.

The score at a rung is that of the end with noise: the correlation over seeds of one setting is 0.5 and 0.7.

    python -m tests.sweeps.test_simulation 400 9      # sweeps, settings: the figures of docs/benchmarks.md
"""

import heapq
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from r1hpc.sweeps.definition import SweepDir, groups_of, points_of
from r1hpc.sweeps.table import Row
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.rungs import Halving
from tests.sweeps.test_sweep import write_sweep

_SEEDS = 3
_RUNGS = [100, 300]
_CORRELATIONS = (0.5, 0.7)


class Simulated(NamedTuple):
    """Count the settings that have all seeds at full length, show an interval, and hold the truth in it."""

    complete: int
    shown: int
    held: int
    is_best_kept: bool


def simulate(folder: Path, rng: random.Random, num_settings: int, spread: float, lower: bool) -> Simulated:
    """Run one sweep; `spread` is that of the settings' true values, in units of the noise of a seed."""
    words = (f"x=0..{num_settings - 1}", f"seed=0..{_SEEDS - 1}")
    points = points_of({"x": [str(n) for n in range(num_settings)], "seed": [str(n) for n in range(_SEEDS)]})
    rungs = Halving(steps=_RUNGS, keep=1 / 3, by="val", lower=lower, groups=groups_of(points))
    sweep = write_sweep(folder, *words, rungs=rungs)
    truth = [rng.gauss(0, spread) for _ in range(num_settings)]
    noise = {point.name: rng.gauss(0, 1) for point in points}
    writers = {point.name: open_run(sweep, point.name) for point in points}
    order = list(range(num_settings))
    rng.shuffle(order)
    events = [(order[int(p.settings["x"])] + rng.random(), 0, p.name, int(p.settings["x"])) for p in points]
    heapq.heapify(events)
    ends: dict[int, list[float]] = {n: [] for n in range(num_settings)}
    while events:
        now, rung, name, setting = heapq.heappop(events)
        if sweep.stage(name).stop.exists():
            continue
        if rung == len(_RUNGS):
            ends[setting].append(truth[setting] + noise[name])
            continue
        share = _CORRELATIONS[rung]
        value = truth[setting] + share * noise[name] + math.sqrt(1 - share**2) * rng.gauss(0, 1)
        writers[name].step(global_step=_RUNGS[rung], val=value)
        heapq.heappush(events, (now + 1 + rng.random(), rung + 1, name, setting))
    rows = {n: Row({}, (), values) for n, values in ends.items() if len(values) == _SEEDS}
    widths = {n: row.half_width for n, row in rows.items() if row.half_width is not None}
    held = sum(abs(rows[n].mean - truth[n]) <= width for n, width in widths.items())
    best = min(ends, key=lambda n: truth[n] if lower else -truth[n])
    return Simulated(len(rows), len(widths), held, best in rows)


def open_run(sweep: SweepDir, name: str) -> MetricWriter:
    sweep.stage(name).path.mkdir()
    return MetricWriter(sweep.stage(name), 1)


def simulate_many(root: Path, count: int, num_settings: int, spread: float) -> list[Simulated]:
    rng, found = random.Random(35), []
    for number in range(count):
        folder = root / str(number)
        folder.mkdir()
        found.append(simulate(folder, rng, num_settings, spread, lower=number % 2 == 0))
    return found


@pytest.mark.slow
def test_intervals_hold_the_truth_under_rungs(tmp_path: Path) -> None:
    found = simulate_many(tmp_path, 300, 9, 1.0)
    shown = sum(each.shown for each in found)
    assert 0.93 <= sum(each.held for each in found) / shown <= 0.97
    assert shown >= 0.8 * sum(each.complete for each in found)
    assert shown < 0.6 * 9 * len(found), "settings were stopped"


@pytest.mark.slow
def test_the_best_setting_survives_in_both_directions(tmp_path: Path) -> None:
    found = simulate_many(tmp_path, 40, 9, 100.0)
    assert all(each.is_best_kept for each in found)


if __name__ == "__main__":
    for spread in (0.0, 0.5, 1.0, 2.0, 4.0):
        with tempfile.TemporaryDirectory() as temporary:
            found = simulate_many(Path(temporary), int(sys.argv[1]), int(sys.argv[2]), spread)
        shown = sum(each.shown for each in found)
        held, kept = sum(e.held for e in found) / shown, sum(e.is_best_kept for e in found) / len(found)
        complete = sum(each.complete for each in found)
        print(f"spread {spread}: {shown} of {complete} show one, {held:.3f} hold, {kept:.2f} best kept")
