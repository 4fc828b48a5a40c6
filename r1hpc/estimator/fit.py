"""Fit the estimator on the published runs, score it on families it has not seen, write both down.

    python -m r1hpc.estimator.fit             # coefficients.json and docs/estimator.md, always the same bytes
    python -m r1hpc.estimator.fit --check     # exit status 1 where they are not what it would write

Regression in ln(MFU) with a prior from physics on every coefficient (r1hpc/plan/features.py says what each
is) and a random intercept for each software stack, so that a family has one vote however many rows it has.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser, run_command
from r1hpc.base.files import write_atomic
from r1hpc.estimator.estimate import billed_belief
from r1hpc.estimator.features import NAMES, features, num_gpus_of, shared_effects
from r1hpc.estimator.fit_rl import fit_rl
from r1hpc.estimator.goodput import FailureRates, overhead
from r1hpc.estimator.mfu import COEFFICIENTS, parse_coefficients
from r1hpc.estimator.published_rows import (
    DATA_FILES,
    FOLDER,
    SINGLE_NODE_FAMILY,
    Group,
    Published,
    by_code_base,
    by_stack,
    in_groups,
    read_published,
)
from r1hpc.estimator.ridge import Posterior, Row, fit

REPORT = Path(__file__).resolve().parents[2] / "docs" / "estimator.md"

PRIOR: dict[str, tuple[float, float]] = {
    "one": (-0.55, 1.0),
    "size": (-0.2, 0.2),
    "recompute": (
        -0.25,
        0.1,
    ),  # ln(3/4) = -0.29 is the worst case: the second pass has no optimizer and no loss
    "recompute_unknown": (-0.1, 0.1),
    "attention": (0.0, 0.5),  # kernels that skip the masked half gain, those that do not lose
    "scale": (-0.03, 0.05),
    "gpu_ridge": (-0.4, 0.3),
    "fp8": (0.3, 0.2),
    "fp16": (-0.1, 0.1),  # it marks software, or cards, from before fused attention
    "sharding": (-0.7, 0.3),
    "bubble": (-1.0, 0.3),
    "tensor": (-1.0, 0.3),
    "offload": (-1.0, 0.3),
    "launch": (-1.0, 0.3),
    "reduction": (-0.5, 0.3),
    "experts": (-0.2, 0.15),
    "run": (-0.1, 0.1),
}
"""(mean, sd) of each coefficient before any row: 1 means the whole of the loss is seen, none of it hidden."""

FAMILY_SD = 0.2
NOISE_SD = 0.1
RUN_NOISE_SD = 0.11
"""Chosen, not fitted; width_scale, which is fitted, corrects their common size."""
RUN_SHARE = 0.3
RUN_SPREAD = 0.22
"""Chosen on the published runs as they are, half of them told as ideal hours and half as elapsed: the share
at which both together have no bias, and what then covers them."""
_ROWS_OF_A_FAMILY = 5.0
"""A family's rows together count as so many independent ones at most."""
_NOMINAL = 0.8
_Z = 1.2816
"""Half of the P10 to P90 interval in standard deviations."""


@dataclass(frozen=True)
class Scored:
    """A row predicted by a fit that saw nothing of its stack. `error` is ln(predicted / actual GPU-hours)."""

    row: Published
    error: float
    sd: float


def observation(row: Published, count: int) -> Row:
    """A row of the regression; `count` rows are in its family."""
    weight = row.weight * min(1.0, _ROWS_OF_A_FAMILY / count)
    values = features(row.workload, float(row.is_long))
    return Row(
        tuple(values[name] for name in NAMES),
        math.log(row.step_mfu),
        row.stack,
        shared_effects(row.workload, FAMILY_SD),
        noise_sd(row.is_long) / math.sqrt(weight),
    )


def noise_sd(is_long: bool) -> float:
    return math.hypot(NOISE_SD, RUN_NOISE_SD) if is_long else NOISE_SD


def fit_rows(rows: Sequence[Published]) -> Posterior:
    """The posterior of the coefficients from these rows."""
    used = [row for row in rows if row.weight > 0]
    counts: dict[str, int] = {}
    for row in used:
        counts[row.family] = counts.get(row.family, 0) + 1
    observations = [observation(row, counts[row.family]) for row in used]
    return fit(observations, [PRIOR[name] for name in NAMES])


def leave_one_out(rows: Sequence[Published], group: Group = by_stack) -> list[Scored]:
    """Every scored row, predicted without all rows of its group."""
    found = []
    for name in in_groups(rows, group):
        posterior = fit_rows([row for row in rows if group(row) != name])
        found += [_score(row, posterior) for row in rows if group(row) == name and row.scored]
    return found


def _score(row: Published, posterior: Posterior) -> Scored:
    values = features(row.workload, float(row.is_long))
    x, shared = [values[name] for name in NAMES], shared_effects(row.workload, FAMILY_SD)
    mean, sd = posterior.predict(x, shared, noise_sd(row.is_long))
    return Scored(row, math.log(row.step_mfu) - mean, sd)


def as_asked(rows: Sequence[Published], scale: float, group: Group = by_stack) -> list[Scored]:
    """The whole runs as the command answers them: nothing is told of what their hours contain."""
    found = []
    for name in in_groups(rows, group):
        rest = fit_rows([row for row in rows if group(row) != name])
        known = parse_coefficients(_coefficients(rest, scale))
        for row in rows:
            if group(row) == name and row.scored and row.is_run and row.gpu_hours:
                belief = billed_belief(row.workload, known)
                lost = overhead(FailureRates(), num_gpus_of(row.workload)).goodput
                hours = row.workload.gpu_hours_at(belief.median) / lost
                found.append(Scored(row, math.log(hours / row.gpu_hours), belief.log_sd))
    return found


def width_scale(scored: Sequence[Scored]) -> float:
    """What the predicted sd must be multiplied with for 80 % of left-out rows to lie inside, one vote a
    family."""
    rows = [s for s in scored if s.row.family != SINGLE_NODE_FAMILY]
    counts: dict[str, int] = {}
    for s in rows:
        counts[s.row.family] = counts.get(s.row.family, 0) + 1
    votes = sorted((abs(s.error) / s.sd, 1 / counts[s.row.family]) for s in rows)
    target, seen = _NOMINAL * math.fsum(vote for _, vote in votes), 0.0
    for z, vote in votes:
        seen += vote
        if seen >= target:
            return z / _Z
    raise AssertionError("the last vote reaches the target")


@dataclass(frozen=True)
class Fitted:
    """The content of coefficients.json, and what it was scored on."""

    coefficients: dict[str, Any]
    scored: list[Scored]
    """Told what each row's hours contain."""
    asked: list[Scored]
    """Not told; `sd` is final here, without the width scale."""
    strict: Mapping[str, float]
    """The summary where a whole code base is left out instead of a stack, at the same width scale."""


def fitted(rows: Sequence[Published]) -> Fitted:
    """Fit all rows, score what was left out."""
    from r1hpc.estimator.fit_report import summary

    scored = leave_one_out(rows)
    scale = _round(width_scale(scored))
    asked = as_asked(rows, scale)
    value = {
        "what": "ln(MFU) = mean . features; made by python -m r1hpc.estimator.fit, do not edit",
        "data": {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in DATA_FILES},
        **_coefficients(fit_rows(rows), scale),
        "rl": {name: _round(value) for name, value in fit_rl().items()},
        "scored": {name: _round(value) for name, value in summary(scored, asked, scale).items()},
    }
    strict = summary(leave_one_out(rows, by_code_base), as_asked(rows, scale, by_code_base), scale)
    return Fitted(value, scored, asked, strict)


def _coefficients(posterior: Posterior, scale: float) -> dict[str, Any]:
    return {
        "features": list(NAMES),
        "mean": [_round(b) for b in posterior.mean],
        "covariance": [[_round(c) for c in line] for line in posterior.covariance],
        "family_sd": FAMILY_SD,
        "noise_sd": NOISE_SD,
        "run_noise_sd": RUN_NOISE_SD,
        "run_share": RUN_SHARE,
        "run_spread": RUN_SPREAD,
        "width_scale": scale,
        "rl": {},
        "scored": {},
    }


def _round(value: float) -> float:
    """Five digits: what a fit on 22 families can tell, and the same on every machine."""
    return float(f"{value:.5g}")


def main(argv: Sequence[str] | None = None) -> int:
    from r1hpc.estimator.fit_report import report

    parser = ArgumentParser(prog="python -m r1hpc.estimator.fit", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; say whether anything would change"
    )
    arguments = parser.parse_args(argv)
    rows = read_published()
    found = fitted(rows)
    texts = {COEFFICIENTS: json.dumps(found.coefficients, indent=1) + "\n", REPORT: report(rows, found)}
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in changed:
        print(f"{'differs' if arguments.check else 'wrote'}: {path}")
        if not arguments.check:
            write_atomic(path, texts[path], mode=0o644)
    if not changed:
        print("nothing changed")
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
