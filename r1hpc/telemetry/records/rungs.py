"""Stop settings of a sweep early that are worse than others at the same step (successive halving).

Such a step is a rung. A run records its number there: `<sweep>/rungs/<step>/<score>~<point>`. The last seed
of a setting decides for all of them (`reached`, called by metrics.py). It compares their mean with those of
the settings decided before, so none waits for another: `<mean>~<first point>~<keep or stop>`. All are empty
files: listing the folder reads them. sweeps/ reads the decisions.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from r1hpc.base.files import read_object
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.telemetry.records.evaluations import read_evaluations

_FOLDER = "rungs"


class Halving(TypedDict):
    """The steps of the rungs, the share of settings that goes on after each, and the number to compare."""

    steps: list[int]
    keep: float
    by: str
    lower: bool
    """True if lower is better."""
    groups: list[list[str]]
    """The points of each setting, one for each seed."""


class _Sweep(TypedDict):
    rungs: Halving


Logged = Callable[[RunDir], Mapping[str, Mapping[int, float]]]
"""`metrics.read_logged`."""


class Rungs:
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
        folder, own = self._run.path.parent / _FOLDER / str(rung), self._run.run_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep = read_object(self._run.path.parent / SWEEP, _Sweep)  # now: another call may have added seeds
        groups = sweep["rungs"]["groups"] if sweep else []
        group = next((names for names in groups if own in names), [own])
        if own not in _scores(folder):
            score = self._score(value)
            (folder / f"{'none' if score is None else repr(score)}~{own}").touch(mode=0o600)
        verdicts = _verdicts(folder)
        if group[0] not in verdicts:
            self._judge(folder, group)
        elif verdicts[group[0]][1] == "stop" and is_now:  # a step that is repeated after a crash
            self._run.stop.touch(mode=0o600)

    def _judge(self, folder: Path, group: Sequence[str]) -> None:
        """Decide on a setting once all its seeds are here, and touch STOP in each if it is dropped.

        Two seeds that come together may both decide: then "stop" counts, in `_verdicts` too.
        """
        scores, first = _scores(folder), group[0]
        if not all(name in scores for name in group):
            return
        numbers = [score for name in group if (score := scores[name]) is not None]
        mean, verdict = None, "keep"
        if len(numbers) == len(group):  # a setting without a number is not compared
            mean = statistics.fmean(numbers)
            others = [other for name, (other, _) in _verdicts(folder).items() if name != first]
            compared = [other for other in others if other is not None]
            best = max(1, math.floor(self._halving["keep"] * (len(compared) + 1) + 1e-9))
            verdict = "keep" if sum(other < mean for other in compared) < best else "stop"
        (folder / f"{'none' if mean is None else repr(mean)}~{first}~{verdict}").touch(mode=0o600)
        for run in (RunDir(self._run.path.parent / name) for name in group if verdict == "stop"):
            if not run.finished.exists():
                run.stop.touch(mode=0o600)

    def _newest(self, rung: int) -> float | None:
        """Return the newest number of an evaluation, or of what the script logged, up to a rung."""
        by = self._halving["by"]
        if by == "pass@1":
            evaluations = read_evaluations(self._run)
            numbers = {step: results["pass_at"]["1"]["value"] for step, results in evaluations.items()}
        else:
            numbers = dict(self._logged(self._run).get(by, {}))
        return next((numbers[step] for step in sorted(numbers, reverse=True) if step <= rung), None)

    def _score(self, value: Any) -> float | None:
        """Return the number to compare, the lower the better; infinite if not finite, None if missing."""
        if not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return math.inf
        return float(value) if self._halving["lower"] else -float(value)


def open_rungs(run: RunDir, logged: Logged) -> Rungs | None:
    """Return the rungs of a run; None if it has none."""
    sweep = read_object(run.path.parent / SWEEP, _Sweep)
    return Rungs(run, sweep["rungs"], logged) if sweep else None


def stopped_at(sweep: Path) -> dict[str, int]:
    """Return the points that were stopped early, with the step of the rung; of a setting the first point."""
    return {
        name: int(folder.name)
        for folder in _folders(sweep)
        for name, (_, verdict) in _verdicts(folder).items()
        if verdict == "stop"
    }


def without_number(sweep: Path) -> dict[int, int]:
    """Return by rung how many points had not recorded the number that is compared, if any."""
    missing = {int(f.name): list(_scores(f).values()).count(None) for f in _folders(sweep)}
    return {step: count for step, count in sorted(missing.items()) if count}


def _folders(sweep: Path) -> list[Path]:
    return [folder for folder in (sweep / _FOLDER).glob("*") if folder.name.isdecimal()]


def _scores(folder: Path) -> dict[str, float | None]:
    return {point: score for score, point in _entries(folder, 2)}


def _verdicts(folder: Path) -> dict[str, tuple[float | None, str]]:
    """Return mean and verdict by the first point of a setting, or by the point in an earlier version."""
    decided = sorted(_entries(folder, 3), key=lambda entry: entry[2])  # stop comes last, and counts
    return {name: (mean, verdict) for mean, name, verdict in decided}


def _entries(folder: Path, count: int) -> list[Any]:
    """Return the parts of the file names that have so many, with the number; others are not ours."""
    entries: list[Any] = []
    for number, *others in (path.name.split("~") for path in folder.iterdir()):
        if len(others) == count - 1:
            with contextlib.suppress(ValueError):
                entries.append((None if number == "none" else float(number), *others))
    return entries
