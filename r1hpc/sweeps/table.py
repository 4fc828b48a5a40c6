"""Read the results of a sweep: one row per setting, with mean and interval over seeds.

    table = read_table(sweep, "eval_loss", lower=True)
    print(table.text())
    table.draw(Path("sweep.png"))

A setting called `seed` repeats the others. The interval is Student's, 95 %, for independent seeds.
"""

import difflib
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from r1hpc.attempt.state.state import State, read_situation
from r1hpc.attempt.state.unended import corrected_history
from r1hpc.attempt.workload import card_of
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import format_table, wrap
from r1hpc.reporting.drawing import Axes, dot, number_axis, row_chart, save_png
from r1hpc.reporting.style import colour
from r1hpc.slurm import defaults
from r1hpc.submission.chain_steps import Action
from r1hpc.sweeps.definition import SweepDir, is_seed, setting_of
from r1hpc.sweeps.plan import PointStep, choose, config_of
from r1hpc.telemetry.records.attempts import gpu_hours_used
from r1hpc.telemetry.records.direction import direction, lower_is_better
from r1hpc.telemetry.records.metrics import last_steps, read_logged
from r1hpc.telemetry.records.rungs import without_number

_MOST_DRAWN = 40
_MOST_FAILED = 10
_MOST_NEAR = 8
_FIRST_CHOICES = ("pass@1", "reward", "loss")
_OF_EACH_STEP = ("grad_norm", "lr", "tokens", "step_time_s", "data_time_s", "tokens_per_second", "mfu")
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's 97.5 % quantiles for 1 to 10 degrees of freedom."""


def student(degrees: int) -> float:
    """Return Student's 97.5 % quantile for this many degrees of freedom, from 1."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.65 / degrees


class Result(NamedTuple):
    """One point: its state, and its numbers if it is finished."""

    step: PointStep
    state: str
    detail: str = ""
    numbers: Mapping[str, float] = {}
    logged: Mapping[str, tuple[int, int]] = {}
    """The step of each number that a script logged, and the last step of the run."""
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Row:
    """All points that differ only in their seeds."""

    settings: Mapping[str, str]
    results: Sequence[Result]
    values: Sequence[float]
    """One for each finished point."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def half_width(self) -> float | None:
        """Return half of the interval of the mean; None without two seeds that differ."""
        count = len(self.values)
        if not math.isfinite(self.mean) or len(set(self.values)) < 2:
            return None
        return student(count - 1) * statistics.stdev(self.values) / math.sqrt(count)

    @property
    def shown(self) -> str:
        width = f" ± {self.half_width:.2g}" if self.half_width is not None else ""
        return f"{self.mean:.4g}{width}" if self.values else "-"

    @property
    def name(self) -> str:
        named = (f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())
        return " ".join(named) or "all"

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "points": {each.step.point.name: each.state for each in self.results},
            "values": [value if math.isfinite(value) else None for value in self.values],
            "mean": self.mean if math.isfinite(self.mean) else None,
            "half_width": self.half_width,
            "gpu_hours": sum(each.gpu_hours for each in self.results),
        }


@dataclass(frozen=True)
class Table:
    """The results of a sweep so far, the best row first."""

    sweep: SweepDir
    by: str
    """The number that is compared; empty while no point has one."""
    rows: Sequence[Row]
    lower: bool | None
    """True if lower is better; None: not known, and the rows are in the order of the sweep."""
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep": self.sweep.name,
            "sweep_dir": str(self.sweep.path),
            "by": self.by,
            "lower": self.lower,
            "notes": list(self.notes),
            "rows": [row.to_json() for row in self.rows],
        }

    def text(self) -> str:
        """Return the table, and why points failed."""
        results = [result for row in self.rows for result in row.results]
        states = ", ".join(f"{n} {state}" for state, n in Counter(r.state for r in results).items())
        keys = list(self.rows[0].settings)
        headings = (*keys, "finished", f"{self.by or 'result'} (± 95 % over seeds)", "range", "GPU-hours")
        rows = [
            (
                *row.settings.values(),
                f"{sum(each.state == Action.skip for each in row.results)} of {len(row.results)}",
                row.shown,
                f"{min(row.values):.4g} to {max(row.values):.4g}" if len(row.values) > 1 else "",
                f"{sum(each.gpu_hours for each in row.results):.2f}",
            )
            for row in self.rows
        ]
        failed = [f"{r.step.point.name} failed: {r.detail}" for r in results if r.state == State.failed]
        table = format_table(headings, rows, right={len(keys) + 3}, indent="  ")
        head = f"{self.sweep.name}: {states}\n  {self.sweep.path}\n"
        notes = [wrap(f"note: {note}", hanging="  ") for note in self.notes]
        return "\n".join([head, table, *map(wrap, failed[:_MOST_FAILED]), *notes])

    def draw(self, path: Path) -> None:
        """Write a chart of the best settings as PNG. Raise UsageError if no finished point has a number."""
        rows = [row for row in self.rows if math.isfinite(row.mean)][:_MOST_DRAWN]
        if not rows:
            raise UsageError(f"{self.sweep.name} has nothing to draw: no finished point has a number")
        named = [(row.name, row.shown, row is rows[0] and self.lower is not None) for row in rows]
        chart = row_chart(self.by, self.by, self.by, named, lambda axes, ys, _: _draw(axes, rows, ys))
        save_png([chart], f"{self.sweep.name}: {self.by}, mean with 95 % interval", path)


def read_table(sweep: SweepDir, by: str | None = None, lower: bool | None = None) -> Table:
    """Return the results of all points so far.

    Raise UsageError if no point has recorded this number, or it is not known which way it is better.

    Args:
        by: the number to compare, such as loss, eval_loss or pass@1; None: that of the rungs, else the first
            of pass@1, reward, loss and the others that there is.
        lower: True if lower is better; None: as the rungs say, else as the name tells.
    """
    definition = sweep.read()
    points = definition.points()
    stage = config_of(definition, points[0]).stage
    executor = "slurm" if defaults.slurm_is_here() else "local"
    results = [_result(step, stage) for step in choose(sweep, points, executor)]
    if definition.rungs is not None and by in (None, definition.rungs["by"]):
        by, lower = definition.rungs["by"], definition.rungs.get("lower") if lower is None else lower
    recorded = dict.fromkeys(name for result in results for name in result.numbers)
    if by is None:
        choices = [name for name in (*_FIRST_CHOICES, *recorded) if name in recorded]
        clear = [name for name in choices if lower_is_better(name) is not None]
        by = next(iter((*clear, *choices)), "")
        lower = lower_is_better(by) if lower is None else lower
    else:
        lower = direction(by, lower)
        if by not in recorded:
            _check_recorded(by, [result.step.run for result in results], stage)
    keys = [key for key in points[0].settings if not is_seed(key)]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(setting_of(result.step.point), []).append(result)
    rows = [
        Row(dict(zip(keys, values, strict=True)), group, [r.numbers[by] for r in group if by in r.numbers])
        for values, group in groups.items()
    ]
    if lower is not None:
        rows.sort(key=lambda row: (row.mean if lower else -row.mean) if math.isfinite(row.mean) else math.inf)
    return Table(sweep, by, rows, lower, _notes(by, lower, results, sweep))


def _check_recorded(by: str, runs: Sequence[RunDir], stage: str) -> None:
    """Raise UsageError with the nearest names unless a point that is not finished has recorded `by`."""
    names = dict.fromkeys(name for run in runs if run.config.is_file() for name in _numbers(run, stage)[0])
    if by in names or (not names and by in _FIRST_CHOICES):
        return
    near = difflib.get_close_matches(by, names, _MOST_NEAR, cutoff=0.0)
    what = f"nearest: {', '.join(map(printable, near))}" if near else "no point has recorded a number yet"
    raise UsageError(f"no point has recorded {printable(by)}; {what}")


def _notes(by: str, lower: bool | None, results: Sequence[Result], sweep: SweepDir) -> list[str]:
    """Return what the order and the numbers do not show."""
    notes = []
    if by and lower is None:
        notes.append(f"nothing tells which way {printable(by)} is better: add --lower or --higher")
    steps = {result.logged[by] for result in results if by in result.logged}
    if steps - {(last, last) for _, last in steps}:
        early = ", ".join(f"step {step} of {last}" for step, last in sorted(steps))
        notes.append(f"the newest {printable(by)} is from {early}")
    for rung, count in without_number(sweep.path).items():
        notes.append(
            f"{count} points reached the rung at step {rung} without its number: their settings go on"
        )
    return notes


def _result(step: PointStep, stage: str) -> Result:
    if step.action is Action.submit:
        return Result(step, "not submitted")
    try:
        history = corrected_history(step.run)
        hours = gpu_hours_used(history, time.time())
        if step.action is Action.skip:
            return Result(step, step.action, "", *_numbers(step.run, stage), hours)
        if step.action is Action.resume:
            now = read_situation(step.run)
            return Result(step, now.state, now.detail, gpu_hours=hours)
        running = State.queued if history.last is None else State.running
        return Result(step, running if step.action is Action.leave else step.action, gpu_hours=hours)
    except (R1hpcError, OSError) as error:  # a damaged point must not hide the others
        return Result(step, "unreadable", str(error))


def _numbers(run: RunDir, stage: str) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """Return the last numbers of a run, and the step of those that a script logged, with the run's last step.

    Numbers of train.jsonl come before those of the card, and these before what a script logged. Those that
    every step has are the last, so that none of them is compared by default.
    """
    numbers: dict[str, float | None] = {}
    steps = last_steps(run, 1)
    for step in steps:
        numbers |= {name: step.number(name) for name in ("loss", *(step.extra or {}))}
    for name, text in card_of(run, stage):
        try:
            numbers[name] = float(text.split()[0])
        except (ValueError, IndexError):
            continue
    of_steps = {name: step.number(name) for step in steps for name in _OF_EACH_STEP if name not in numbers}
    logged = {
        name: next(reversed(by_step.items()))
        for name, by_step in read_logged(run).items()
        if numbers.get(name) is None and of_steps.get(name) is None
    }
    numbers |= {name: value for name, (_, value) in logged.items()} | of_steps
    last = steps[-1].global_step if steps else 0
    ends = {name: (step, max(step, last)) for name, (step, _) in logged.items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}, ends


def _draw(axes: Axes, rows: Sequence[Row], ys: Sequence[float]) -> None:
    """Draw a dot for each seed, on the interval of their mean."""
    reach = [(row.mean - width, row.mean + width) for row in rows for width in [row.half_width or 0.0]]
    ends = [end for row, both in zip(rows, reach, strict=True) for end in (*both, *row.values)]
    margin = (max(ends) - min(ends)) * 0.05 or abs(ends[0]) * 0.05 or 1.0
    number_axis(axes.xaxis, min(ends) - margin, max(ends) + margin)
    for y, row, both in zip(ys, rows, reach, strict=True):
        axes.plot(both, [y, y], color=colour("median"), lw=2)
        for value in row.values:
            dot(axes, value, y, "useful", f"{row.name}: {value:.4g}", size=6)
