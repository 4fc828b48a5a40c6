"""The regression of ln(MFU) on the published rows: its priors, its rows, and what it leaves to the package.

    posterior = fit_rows(read_published())
    as_json(posterior, width_scale=1.1)      # the content of coefficients.json but for scores and RL

Every coefficient has a prior from physics (r1hpc/plan/hours/mfu.py says what each is), and each
software stack a random intercept, so that a family has one vote however many rows it has.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from r1hpc.plan.hours.mfu import NAMES, Posterior, class_of, features, shared_effects
from research.estimator.published_rows import Published
from research.estimator.ridge import Row, fit

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
    "deepspeed": (0.0, 0.1),
    "torch": (0.0, 0.1),
    "megatron": (0.0, 0.1),
    "fp8_stack": (0.2, 0.3),
    "fp8_experts": (-0.2, 0.2),
    "fp4": (0.25, 0.2),
    "experts_apart": (-0.3, 0.3),
}
"""(mean, sd) of each coefficient before any row: 1 means the whole of the loss is seen, none of it hidden."""

FAMILY_SD = 0.12
NOISE_SD = 0.1
RUN_NOISE_SD = 0.11
"""Chosen, not fitted; width_scale, which is fitted, corrects their common size."""
RUN_SHARE = 0.3
RUN_SPREAD = 0.22
"""Chosen on the published runs as they are, half of them given as ideal hours and half as elapsed: the share
at which both together have no bias, and what then covers them."""
_ROWS_OF_A_FAMILY = 5.0
"""A family's rows together count as so many independent ones at most."""


def observation(row: Published, count: int) -> Row:
    """A row of the regression; `count` rows are in its family."""
    weight = row.weight * min(1.0, _ROWS_OF_A_FAMILY / count)
    values = features(row.workload, float(row.is_long))
    return Row(
        tuple(values[name] for name in NAMES),
        math.log(row.step_mfu),
        row.team,
        shared_effects(row.workload, FAMILY_SD),
        noise_sd(row.is_long) / math.sqrt(weight),
    )


def noise_sd(is_long: bool) -> float:
    return math.hypot(NOISE_SD, RUN_NOISE_SD) if is_long else NOISE_SD


def fit_rows(rows: Sequence[Published]) -> Posterior:
    """The posterior of the coefficients from these rows."""
    used = [row for row in rows if row.weight > 0]
    counts = Counter(row.family for row in used)
    observations = [observation(row, counts[row.family]) for row in used]
    return fit(observations, [PRIOR[name] for name in NAMES])


def families_by_class(rows: Sequence[Published]) -> dict[str, int]:
    """Return the families fitted in each class, with its stack and over all stacks."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.weight > 0:
            name = class_of(row.workload)
            found[name].add(row.team)
            if row.workload.stack is not None:
                found[name.rpartition(", ")[0]].add(row.team)
    return {name: len(teams) for name, teams in sorted(found.items())}


def as_json(posterior: Posterior, scale: float, rows: Sequence[Published]) -> dict[str, Any]:
    return {
        "features": list(NAMES),
        "mean": [five_digits(b) for b in posterior.mean],
        "covariance": [[five_digits(c) for c in line] for line in posterior.covariance],
        "family_sd": FAMILY_SD,
        "noise_sd": NOISE_SD,
        "run_noise_sd": RUN_NOISE_SD,
        "run_share": RUN_SHARE,
        "run_spread": RUN_SPREAD,
        "width_scale": scale,
        "families": families_by_class(rows),
        "rl": {},
        "scored": {},
    }


def five_digits(value: float) -> float:
    """Five digits: what a fit on 22 families can resolve, and the same on every machine."""
    return float(f"{value:.5g}")
