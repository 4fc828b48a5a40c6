"""Arms beside their baseline, with how sure one can be: the arithmetic, and the table for a person.

    compare([(0.98, 0.97), (0.99, 0.96)])       # pairs (arm, baseline), one per seed
    print(as_text(results))

The seeds are the sample: an arm and the baseline of one seed share questions, random streams and, where the
arm allows it, the cold start; so differences are paired, and the interval is Student's t over the seeds. It
says nothing of other tasks or models, and it is not corrected for the number of arms.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.base.tables import format_table, wrap
from r1hpc.base.units import format_duration
from research.ablation.results import ArmResult, Results

# Student's t, two-sided 95 %, by degrees of freedom 1 to 10 (any statistical table).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z95 = 1.959964


@dataclass(frozen=True)
class Difference:
    """Mean of arm - baseline over n seeds; low and high are None for fewer than two."""

    n: int
    mean: float
    low: float | None
    high: float | None


def t95(df: int) -> float:
    """The 97.5 % point of Student's t.

    Beyond the table by the expansion in 1/df (Abramowitz and Stegun 26.7.5), good to 3e-4 there.
    """
    if df <= len(_T95):
        return _T95[df - 1]
    z = _Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


def compare(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """The paired difference; None without any pair."""
    differences = [arm - baseline for arm, baseline in pairs]
    n = len(differences)
    if n == 0:
        return None
    mean = math.fsum(differences) / n
    if n == 1:
        return Difference(1, mean, None, None)
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = t95(n - 1) * deviation / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)


def difference_of(results: Results, arm: ArmResult, key: str) -> Difference | None:
    """Arm against baseline in one measure, over the seeds that have both."""
    ours, theirs = arm.values(key), results.arms[0].values(key)
    return compare([(ours[seed], theirs[seed]) for seed in results.seeds if seed in ours and seed in theirs])


def difference_to(results: Results, arm: ArmResult, mark: float) -> Difference | None:
    """Arm against baseline in steps to the mark; None where either did not reach it in every seed: over those
    in which it did, the one that does so seldom would look the faster.
    """
    ours, theirs = arm.steps_to(mark), results.arms[0].steps_to(mark)
    if not (len(ours) == len(arm.outcomes) and len(theirs) == len(results.arms[0].outcomes)):
        return None
    return compare([(ours[seed], theirs[seed]) for seed in results.seeds if seed in ours and seed in theirs])


def mean_of(arm: ArmResult, key: str) -> float | None:
    """Over the seeds that have it."""
    values = list(arm.values(key).values())
    return math.fsum(values) / len(values) if values else None


_MEASURES = (
    ("greedy", "greedy"),
    ("pass_at_1", "T=1"),
    ("pass_at_n", "pass@n"),
    ("response_length", "length"),
    ("thinking_share", "thinking"),
    ("accuracy_given_thinking_before", "acc|think SFT"),
)
_COMPARED = {"pass_at_1": "T=1", "greedy": "greedy", "response_length": "length"}
_AFTER_SFT = {"accuracy_given_thinking_before": "acc|think SFT"}


def compared(results: Results) -> dict[str, str]:
    """Measures whose differences are shown, with headings; that after SFT only where arms differ in it."""
    key = next(iter(_AFTER_SFT))
    baseline = results.arms[0].values(key)
    others = [value != baseline.get(seed) for arm in results.arms for seed, value in arm.values(key).items()]
    return {**_COMPARED, **(_AFTER_SFT if any(others) else {})}


def as_object(results: Results, mark: float | None = None) -> dict[str, Any]:
    """The one object of --json: the results, with means and differences; with steps to a mark of pass@1."""
    keys = [key for key, _ in _MEASURES] + ["num_completions", "step_time_s", "wall_s", "cold_start_s"]
    arms = [
        {
            **asdict(arm),
            "mean": {key: mean_of(arm, key) for key in keys},
            "difference": {key: _json(difference_of(results, arm, key)) for key in compared(results)},
        }
        for arm in results.arms
    ]
    baseline = results.arms[0].name
    complete = results.num_finished == results.num_wanted
    found = {**results.to_json(), "baseline": baseline, "complete": complete, "arms": arms}
    if mark is not None:
        steps = {
            arm.name: {"by_seed": arm.steps_to(mark), "difference": _json(difference_to(results, arm, mark))}
            for arm in results.arms
        }
        found |= {"mark": mark, "steps_to_mark": steps}
    return found


def as_text(results: Results, mark: float | None = None) -> str:
    """The comparison for a terminal, with steps to a mark of pass@1."""
    baseline, n = results.arms[0].name, len(results.seeds)
    head = f"{results.ablation}: {results.question}"
    finished = f"{results.num_finished} of {results.num_wanted} arms are finished ({n} seeds)"
    parts = [head, finished, format_table(*_means(results)), format_table(*_differences(results))]
    parts.append(format_table(*_seeds(results)))
    if mark is not None:
        parts.append(format_table(*_marks(results, mark)))
    parts.append(wrap(_LEGEND.format(baseline=baseline), hanging=""))
    parts += [wrap(f"not run: {name}: {reason}") for name, reason in results.refused.items()]
    return "\n\n".join(parts)


def format_difference(difference: Difference | None, digits: int = 3) -> str:
    """`+0.012 [-0.004, +0.028]`."""
    if difference is None:
        return "-"
    low, high = difference.low, difference.high
    interval = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{difference.mean:+.{digits}f}{interval}"


def format_number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_LEGEND = (
    "T=1: accuracy of samples at temperature 1. Differences are paired by seed against {baseline}, with 95 % "
    "of Student's t over the seeds, not corrected for the number of arms. acc|think SFT: accuracy of the "
    "samples that think, after the cold start."
)
_Table = tuple[Sequence[str], list[Sequence[str]], range]


def _means(results: Results) -> _Table:
    headings = ("arm", "n", *(words for _, words in _MEASURES), "samples", "s/step", "RL wall")
    rows: list[Sequence[str]] = []
    for arm in results.arms:
        means = [
            format_number(mean_of(arm, key), 1 if key == "response_length" else 3) for key, _ in _MEASURES
        ]
        wall, samples = mean_of(arm, "wall_s"), mean_of(arm, "num_completions")
        rows.append(
            (
                arm.name,
                str(len(arm.outcomes)),
                *means,
                format_number(samples, 0),
                format_number(mean_of(arm, "step_time_s"), 2),
                "-" if wall is None else format_duration(wall),
            )
        )
    return headings, rows, range(1, len(headings))


def _differences(results: Results) -> _Table:
    keys = compared(results)
    headings = (f"minus {results.arms[0].name}", "n", *keys.values())
    rows: list[Sequence[str]] = []
    for arm in results.arms[1:]:
        found = [difference_of(results, arm, key) for key in keys]
        n = found[0].n if found[0] else 0
        rows.append((arm.name, str(n), *map(format_difference, found)))
    return headings, rows, range(1, len(headings))


def _seeds(results: Results) -> _Table:
    headings = ("T=1 of each", *(f"seed {seed}" for seed in results.seeds))
    rows: list[Sequence[str]] = [
        (arm.name, *(format_number(arm.values("pass_at_1").get(seed)) for seed in results.seeds))
        for arm in results.arms
    ]
    return headings, rows, range(1, len(headings))


def _marks(results: Results, mark: float) -> _Table:
    baseline = results.arms[0].name
    seeds = [f"seed {seed}" for seed in results.seeds]
    headings = (f"steps to T=1 of {mark:g}", "reached", *seeds, "mean", f"minus {baseline}")
    rows: list[Sequence[str]] = []
    for arm in results.arms:
        steps = arm.steps_to(mark)
        reached_always = bool(steps) and len(steps) == len(arm.outcomes)
        mean = math.fsum(steps.values()) / len(steps) if reached_always else None
        difference = difference_to(results, arm, mark) if arm.name != baseline else None
        each = (format_number(steps.get(seed), 1) for seed in results.seeds)
        reached = f"{len(steps)} of {len(arm.outcomes)}"
        rows.append((arm.name, reached, *each, format_number(mean, 1), format_difference(difference, 1)))
    return headings, rows, range(1, len(headings))


def _json(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else asdict(difference)
