"""Stop points of a sweep early that are worse than others at the same step (successive halving).

Such a step is a rung. A run decides for itself when it records that step (`reached`, called by metrics.py):
it compares itself with those that were there before it, so none waits for another. sweeps/ reads the
decisions. Each is an empty file, `<sweep>/rungs/<step>/<score>~<point>~<keep or stop>`: listing the folder
reads them all.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1hpc.base.files import read_object
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.telemetry.records.direction import lower_is_better
from r1hpc.telemetry.records.evaluations import read_evaluations

_FOLDER = "rungs"


class Halving(TypedDict):
    """The steps of the rungs, the share of points that goes on after each, and the number to compare."""

    steps: list[int]
    keep: float
    by: str
    lower: NotRequired[bool]
    """True if lower is better; missing in sweeps of earlier versions."""


class _Sweep(TypedDict):
    rungs: Halving


Logged = Callable[[RunDir], Mapping[str, Mapping[int, float]]]
"""`metrics.read_logged`."""


class Rungs:
    """The rungs of one run."""

    def __init__(self, run: RunDir, halving: Halving, logged: Logged) -> None:
        self._run, self._halving, self._logged = run, halving, logged
        self._left = list(halving["steps"])

    def reached(self, step: int, fields: Mapping[str, Any]) -> None:
        """Decide at a rung, once, whether the run goes on; touch STOP if not.

        A number that the step itself lacks, such as an evaluation's, is looked for when the next step ends.
        """
        while self._left and self._left[0] <= step:
            rung, value = self._left[0], fields.get(self._halving["by"])
            if rung < step:
                value = self._newest(rung)
            elif value is None:
                return
            self._left.pop(0)
            self._decide(rung, value, is_now=rung == step)

    def _decide(self, rung: int, value: float | None, is_now: bool) -> None:
        folder = self._run.path.parent / _FOLDER / str(rung)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scores = {name: (float(score), said) for score, name, said in _decisions(folder)}
        is_new = self._run.run_id not in scores
        if is_new:
            score = self._score(value)
            better = sum(other < score for other, _ in scores.values())
            best = max(1, math.floor(self._halving["keep"] * (len(scores) + 1) + 1e-9))
            said = "keep" if better < best else "stop"
            (folder / f"{score!r}~{self._run.run_id}~{said}").touch(mode=0o600)
            scores[self._run.run_id] = score, said
        if scores[self._run.run_id][1] == "stop" and (is_new or is_now):
            self._run.stop.touch(mode=0o600)

    def _newest(self, rung: int) -> float | None:
        """Return the newest number of an evaluation, or of what the script logged, up to a rung."""
        by = self._halving["by"]
        found = {step: each["pass_at"]["1"]["value"] for step, each in read_evaluations(self._run).items()}
        numbers = found if by == "pass@1" else self._logged(self._run).get(by, {})
        return next((numbers[step] for step in sorted(numbers, reverse=True) if step <= rung), None)

    def _score(self, value: Any) -> float:
        """Return the number to compare, the lower the better; infinite if it is missing or not finite."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            return math.inf
        by = self._halving["by"]
        return float(value) if self._halving.get("lower", lower_is_better(by)) else -float(value)


def open_rungs(run: RunDir, logged: Logged) -> Rungs | None:
    """Return the rungs of a run; None if it has none."""
    found = read_object(run.path.parent / SWEEP, _Sweep)
    return Rungs(run, found["rungs"], logged) if found else None


def stopped_at(sweep: Path) -> dict[str, int]:
    """Return the points that were stopped early, with the step of the rung."""
    folders = (folder for folder in (sweep / _FOLDER).glob("*") if folder.name.isdecimal())
    return {name: int(f.name) for f in folders for _, name, said in _decisions(f) if said == "stop"}


def _decisions(folder: Path) -> list[tuple[str, ...]]:
    found = (tuple(path.name.split("~")) for path in folder.iterdir())
    return [parts for parts in found if len(parts) == 3]
