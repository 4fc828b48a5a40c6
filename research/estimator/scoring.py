"""How well rows are predicted by a fit that has not seen their family.

    found = fit_and_score(read_published())
    found.coefficients          # the content of coefficients.json
    found.scored, found.asked   # every left-out row with its error

Two scores: of rows whose kind of hours is given (ideal or elapsed), and of whole runs as the command
`estimate` answers them, which cannot know it.
"""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1hpc.plan.hours.estimate import billed_belief
from r1hpc.plan.hours.goodput import FailureRates, overhead
from r1hpc.plan.hours.mfu import (
    NAMES,
    Posterior,
    class_of,
    features,
    few_variance,
    num_gpus_of,
    parse_coefficients,
    shared_effects,
)
from r1hpc.plan.hours.spread import Z90
from research.estimator.published_rows import (
    DATA_FILES,
    FOLDER,
    SINGLE_NODE_FAMILY,
    Group,
    Published,
    by_code_base,
    by_team,
    in_groups,
)
from research.estimator.regression import (
    FAMILY_SD,
    as_json,
    families_by_class,
    fit_rows,
    five_digits,
    noise_sd,
)
from research.estimator.ridge import predict
from research.estimator.rl import fit_rl

_NOMINAL = 0.8


@dataclass(frozen=True)
class Scored:
    """A row predicted by a fit that saw nothing of its stack. `error` is ln(predicted / actual GPU-hours)."""

    row: Published
    error: float
    sd: float


def is_a100(row: Published) -> bool:
    return row.workload.gpu.family in ("A100", "A800")


def is_table(row: Published) -> bool:
    """A measured step; the 1,440 single-node rows would drown the others and are a group of their own."""
    return not row.is_run and row.family != SINGLE_NODE_FAMILY


GROUPS: tuple[tuple[str, Callable[[Published], bool]], ...] = (
    ("A100 whole runs", lambda row: row.is_run and is_a100(row)),
    ("A100 throughput tables", lambda row: is_table(row) and is_a100(row)),
    ("H100, H800 whole runs", lambda row: row.is_run and not is_a100(row)),
    ("H100, H200 throughput tables", lambda row: is_table(row) and not is_a100(row)),
    ("vTrain, one node of A100", lambda row: row.family == SINGLE_NODE_FAMILY),
)


def summary(scored: Sequence[Scored], asked: Sequence[Scored], scale: float) -> dict[str, float]:
    """The figures that coefficients.json carries."""
    kinds = {
        "runs": ([s for s in scored if s.row.is_run and is_a100(s.row)], scale),
        "runs_asked": ([s for s in asked if is_a100(s.row)], 1.0),
        "tables": ([s for s in scored if is_table(s.row) and is_a100(s.row)], scale),
    }
    found = {}
    for kind, (group, factor) in kinds.items():
        found[f"a100_{kind}_mdape"] = mdape([s.error for s in group])
        found[f"a100_{kind}_coverage"] = coverage(group, factor)
        found[f"a100_{kind}_width"] = width(group, factor)
    return found


def leave_one_out(rows: Sequence[Published], group: Group = by_team) -> list[Scored]:
    """Every scored row, predicted without all rows of its group."""
    found = []
    for name in in_groups(rows, group):
        rest = [row for row in rows if group(row) != name]
        posterior, families = fit_rows(rest), families_by_class(rest)
        found += [_score(row, posterior, families) for row in rows if group(row) == name and row.scored]
    return found


def _score(row: Published, posterior: Posterior, families: Mapping[str, int]) -> Scored:
    values = features(row.workload, float(row.is_long))
    x, shared = [values[name] for name in NAMES], shared_effects(row.workload, FAMILY_SD)
    mean, sd = predict(posterior, x, shared, noise_sd(row.is_long))
    few = few_variance(families.get(class_of(row.workload), 0))
    return Scored(row, math.log(row.step_mfu) - mean, math.sqrt(sd**2 + few))


def as_asked(rows: Sequence[Published], scale: float, group: Group = by_team) -> list[Scored]:
    """The whole runs as the command answers them: the kind of their hours is not given."""
    found = []
    for name in in_groups(rows, group):
        rest = [row for row in rows if group(row) != name]
        known = parse_coefficients(as_json(fit_rows(rest), scale, rest))
        for row in rows:
            if group(row) == name and row.scored and row.is_run and row.gpu_hours:
                belief = billed_belief(row.workload, known)
                lost = overhead(FailureRates(), num_gpus_of(row.workload)).goodput
                hours = row.workload.gpu_hours_at(belief.median) / lost
                found.append(Scored(row, math.log(hours / row.gpu_hours), belief.log_sd))
    return found


def width_scale(scored: Sequence[Scored]) -> float:
    """Return the factor of the predicted sd for 80 % of left-out rows to lie inside, one vote a
    family."""
    rows = [s for s in scored if s.row.family != SINGLE_NODE_FAMILY]
    counts = Counter(s.row.family for s in rows)
    votes = sorted((abs(s.error) / s.sd, 1 / counts[s.row.family]) for s in rows)
    target, seen = _NOMINAL * math.fsum(vote for _, vote in votes), 0.0
    for z, vote in votes:
        seen += vote
        if seen >= target:
            return z / Z90
    raise AssertionError("the last vote reaches the target")


@dataclass(frozen=True)
class Fitted:
    """The content of coefficients.json, and what it was scored on."""

    coefficients: dict[str, Any]
    scored: list[Scored]
    """Given what each row's hours contain."""
    asked: list[Scored]
    """Not given it; `sd` is final here, without the width scale."""
    strict: Mapping[str, float]
    """The summary where a whole code base is left out instead of a stack, at the same width scale."""


def fit_and_score(rows: Sequence[Published]) -> Fitted:
    """Fit all rows, score what was left out."""
    scored = leave_one_out(rows)
    scale = five_digits(width_scale(scored))
    asked = as_asked(rows, scale)
    value = {
        "what": "ln(MFU) = mean . features; made by python -m research.estimator.fit, do not edit",
        "data": {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in DATA_FILES},
        **as_json(fit_rows(rows), scale, rows),
        "rl": {name: five_digits(value) for name, value in fit_rl().items()},
        "scored": {name: five_digits(value) for name, value in summary(scored, asked, scale).items()},
    }
    strict = summary(leave_one_out(rows, by_code_base), as_asked(rows, scale, by_code_base), scale)
    return Fitted(value, scored, asked, strict)


def mdape(errors: Sequence[float]) -> float:
    return statistics.median(abs(math.expm1(error)) for error in errors)


def coverage(group: Sequence[Scored], scale: float, by_family: bool = False) -> float:
    inside = [(s.row.family, abs(s.error) <= Z90 * scale * s.sd) for s in group]
    if not by_family:
        return statistics.fmean(hit for _, hit in inside)
    names = sorted({family for family, _ in inside})
    return statistics.fmean(
        statistics.fmean(hit for family, hit in inside if family == name) for name in names
    )


def width(group: Sequence[Scored], scale: float) -> float:
    return statistics.median(math.exp(2 * Z90 * scale * s.sd) for s in group)
