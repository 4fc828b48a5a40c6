"""Compare two groups of runs over their seeds: `report --compare 'base-*' 'new-*'`, or two sweeps.

    found = compare_groups("base-*", "new-*", run_root)
    print(found.text())

Each number is the mean over the finished runs of a group with Student's 95 % interval; the difference has
Welch's, with its degrees of freedom rounded down. Runs count as independent.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from r1hpc.base.choose_run import all_runs, full_name
from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.base.tables import format_table, wrap
from r1hpc.config.load import read
from r1hpc.config.origins import frozen
from r1hpc.sweeps.table import student
from r1hpc.telemetry.records.evaluations import first_and_newest
from r1hpc.telemetry.records.metrics import last_steps

_MOST_NAMED = 8


@dataclass(frozen=True)
class Groups:
    """Two groups with the numbers that all their runs have."""

    names: tuple[str, str]
    runs: tuple[Sequence[str], Sequence[str]]
    values: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        numbers = {
            name: {"a": list(a), "b": list(b), "difference": _difference(a, b)}
            for name, (a, b) in self.values.items()
        }
        return {"groups": dict(zip(self.names, map(list, self.runs), strict=True)), "numbers": numbers} | {
            "notes": list(self.notes)
        }

    def text(self) -> str:
        """Return the groups, a table of their numbers, and what else differs."""
        heads = [
            wrap(f"{letter}  {printable(name)}: {len(runs)} finished runs, {', '.join(runs)}", "", "   ")
            for letter, name, runs in zip("AB", self.names, self.runs, strict=True)
        ]
        rows = []
        for name, (a, b) in self.values.items():
            difference = _difference(a, b)
            interval = (
                f"[{difference['low']:+.4g}, {difference['high']:+.4g}]" if "low" in difference else "-"
            )
            rows.append((name, _shown(a), _shown(b), f"{difference['value']:+.4g}", interval))
        table = format_table(("", "A", "B", "B - A", "95 % interval"), rows, {1, 2, 3, 4}, indent="  ")
        notes = [wrap(f"note: {note}", hanging="  ") for note in self.notes]
        return "\n".join([*heads, table, *notes])


def is_group(given: str, root: Path) -> bool:
    """True if the words name several runs: a pattern or a sweep."""
    return any(mark in given for mark in "*?[") or (root / given / SWEEP).is_file()


def compare_groups(a: str, b: str, root: Path) -> Groups:
    """Return both groups' numbers. Raise UsageError without a finished run in each, or a number in all."""
    notes: list[str] = []
    groups = [_finished(given, root, notes) for given in (a, b)]
    if shared := {run.path for run in groups[0]} & {run.path for run in groups[1]}:
        raise UsageError(f"{len(shared)} runs are in both groups, such as {min(shared).name}: name others")
    numbers = [[_numbers(run) for run in group] for group in groups]
    rows = [row for group in numbers for row in group]
    everywhere = [set(row) for row in rows]
    names = [name for name in numbers[0][0] if all(name in there for there in everywhere)]
    if not names:
        raise UsageError(f"no number is in all runs of {printable(a)} and {printable(b)}")
    if missing := sorted(set().union(*everywhere) - set(names)):
        notes.append(f"left out, as some runs lack it or asked other questions: {', '.join(missing)}")
    steps = {int(row["steps"]) for row in rows if "steps" in row}
    if len(steps) > 1:
        notes.append(f"the runs ended at different steps: {', '.join(map(str, sorted(steps)))}")
    values = {}
    for name in [name for name in names if name != "steps"]:
        of_a, of_b = ([row[name] for row in group] for group in numbers)
        values[name.partition("\0")[0]] = of_a, of_b
    runs = [full_name(run) for run in groups[0]], [full_name(run) for run in groups[1]]
    return Groups((a, b), runs, values, [*notes, *_settings_notes(groups)])


def _finished(given: str, root: Path, notes: list[str]) -> list[RunDir]:
    pattern = f"{Path(given).name}/*" if (root / given / SWEEP).is_file() else given
    runs = [run for run in all_runs(root) if fnmatchcase(full_name(run), pattern)]
    runs = sorted(runs, key=full_name)
    finished = [run for run in runs if run.finished.exists()]
    if not finished:
        raise UsageError(f"{printable(given)}: none of {len(runs)} runs under {root} is finished")
    if len(finished) < len(runs):
        others = [full_name(run) for run in runs if run not in finished]
        notes.append(f"not finished, and left out: {', '.join(others[:_MOST_NAMED])}")
    if len(finished) == 1:
        notes.append(f"{printable(given)} has one run: no interval")
    return finished


def _numbers(run: RunDir) -> dict[str, float]:
    """Return what the run ended with; accuracies under names that contain the questions, after a NUL."""
    found: dict[str, float] = {}
    summary = first_and_newest(run)[1]
    if summary is not None:
        record = next(
            (p for p in (run.metrics / "evaluated.json", run.parts / "questions.json") if p.exists()), None
        )
        asked = read_json(record, dict[str, Any]).get("task", "") if record else ""
        for label, each in (summary.get("tasks") or {"": summary}).items():
            same = f"\0{asked or run.path} {each['num_items']}"  # unknown questions are like no others
            found[f"pass@1 {label}".strip() + same] = each["pass_at"]["1"]["value"]
            found[f"greedy {label}".strip() + same] = each["greedy"]["value"]
    for step in last_steps(run, 1):
        known = {name: step.number(name) for name in ("reward", "loss")}
        found |= {name: float(value) for name, value in known.items() if value is not None}
        found["steps"] = float(step.global_step)
    return found


def _settings_notes(groups: Sequence[Sequence[RunDir]]) -> list[str]:
    """Return sentences on the settings that differ between the groups, and inside one beside the seed."""
    columns = [
        [{each.key: str(each.value) for each in frozen(read(run.config), "")} for run in group]
        for group in groups
    ]
    kinds: dict[str, list[str]] = {"inside a group": [], "between the groups": []}
    for key in columns[0][0]:
        sets = [{settings.get(key, "") for settings in group} for group in columns]
        if max(map(len, sets)) > 1 and key.rpartition(".")[2] != "seed":
            kinds["inside a group"].append(key)
        elif max(map(len, sets)) == 1 and sets[0] != sets[1]:
            kinds["between the groups"].append(f"{key} {min(sets[0])} and {min(sets[1])}")
    return [
        f"settings that differ {where}: {', '.join(keys[:_MOST_NAMED])}{' ...' * (len(keys) > _MOST_NAMED)}"
        for where, keys in kinds.items()
        if keys
    ]


def _shown(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4g}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {student(len(values) - 1) * error:.2g}"


def _difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Return B - A with Welch's 95 % interval, which needs two runs in each group."""
    value = statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return {"value": value}
    parts = [(statistics.variance(each) / len(each), len(each) - 1) for each in (a, b)]
    error = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    half = student(max(1, int(error**2 / spread))) * math.sqrt(error) if spread else 0.0
    return {"value": value, "low": value - half, "high": value + half}
