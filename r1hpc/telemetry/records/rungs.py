"""Stop points of a sweep early that are worse than others at the same step (successive halving).

Such a step is a rung. A run decides for itself when it records that step (`reached`, called by metrics.py):
it compares itself with those that were there before it, so none waits for another. sweeps/ reads the
decisions. Each is an empty file, `<sweep>/rungs/<step>/<score>~<point>~<keep or stop>`: listing the folder
reads them all.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from r1hpc.base.files import read_object
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.telemetry.records.evaluations import read_evaluations

_FOLDER = "rungs"


class Halving(TypedDict):
    """The steps of the rungs, the share of points that goes on after each, and the number to compare."""

    steps: list[int]
    keep: float
    by: str


class _Sweep(TypedDict):
    rungs: Halving


class Rungs:
    """The rungs of one run."""

    def __init__(self, run: RunDir, halving: Halving) -> None:
        self._run, self._halving = run, halving

    def reached(self, step: int, fields: Mapping[str, Any]) -> None:
        """Decide at a rung, once, whether the run goes on; touch STOP if not."""
        if step not in self._halving["steps"]:
            return
        folder = self._run.path.parent / _FOLDER / str(step)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scores = {name: (float(score), said) for score, name, said in _decisions(folder)}
        if self._run.run_id not in scores:
            score = self._score(fields)
            better = sum(other < score for other, _ in scores.values())
            best = max(1, math.floor(self._halving["keep"] * (len(scores) + 1) + 1e-9))
            said = "keep" if better < best else "stop"
            (folder / f"{score!r}~{self._run.run_id}~{said}").touch(mode=0o600)
            scores[self._run.run_id] = score, said
        if scores[self._run.run_id][1] == "stop":
            self._run.stop.touch(mode=0o600)

    def _score(self, fields: Mapping[str, Any]) -> float:
        """Return the number to compare, the lower the better; infinite if it is missing."""
        by = self._halving["by"]
        value = fields.get(by)
        if by == "pass@1":
            newest = next(reversed(read_evaluations(self._run).values()), None)
            value = newest["pass_at"]["1"]["value"] if newest else None
        if not isinstance(value, int | float) or math.isnan(value):
            return math.inf
        return float(value) if lower_is_better(by) else -float(value)


def open_rungs(run: RunDir) -> Rungs | None:
    """Return the rungs of a run; None if it has none."""
    found = read_object(run.path.parent / SWEEP, _Sweep)
    return Rungs(run, found["rungs"]) if found else None


def lower_is_better(number: str) -> bool:
    return "loss" in number or "perplexity" in number or number.endswith("_time_s")


def stopped_at(sweep: Path) -> dict[str, int]:
    """Return the points that were stopped early, with the step of the rung."""
    folders = (folder for folder in (sweep / _FOLDER).glob("*") if folder.name.isdecimal())
    return {name: int(f.name) for f in folders for _, name, said in _decisions(f) if said == "stop"}


def _decisions(folder: Path) -> list[tuple[str, ...]]:
    found = (tuple(path.name.split("~")) for path in folder.iterdir())
    return [parts for parts in found if len(parts) == 3]
