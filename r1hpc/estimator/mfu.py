"""The distribution of MFU that published runs lead one to expect, given what is known of a run.

    belief = mfu_belief(work)
    belief.median, belief.log_sd, belief.variances

Reads coefficients.json, which `python -m research.estimator.fit` makes. MFU counts no recomputation and
the full square of attention, against the dense bf16 peak; a run in FP8 may therefore pass what bf16 could
reach.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from r1hpc.base.errors import StateError
from r1hpc.estimator.features import NAMES, features, shared_effects
from r1hpc.estimator.workload import Workload

COEFFICIENTS = Path(__file__).resolve().parent / "coefficients.json"
_REACHABLE = 0.87
"""Part of the dense peak, by the best of large matrix products on an A100 (stas00/ml-engineering, MAMF: 271
of 312)."""
SLOWER = {"tf32": 1 / 2, "fp32": 1 / 15}
"""Peaks beside bf16's, of an A100 (156 and 19.5 of 312) and an H100 (495 and 67 of 989). Not fitted: nobody
publishes such runs."""
_LONG_RUN_HOURS = 48.0
"""A run of this many wall hours has met most of what a long run meets; a scale, assumed."""


@dataclass(frozen=True)
class Posterior:
    """Mean and covariance of the coefficients, in the order of NAMES."""

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def variance(self, x: Sequence[float]) -> float:
        """What the coefficients' own uncertainty adds."""
        return math.fsum(
            x[i] * x[j] * self.covariance[i][j] for i in range(len(x)) for j in range(len(x)) if x[i] and x[j]
        )


@dataclass(frozen=True)
class Coefficients:
    """What the fit left: everything an estimate needs."""

    posterior: Posterior
    family_sd: float
    noise_sd: float
    run_noise_sd: float
    run_share: float
    """Part of the excess of published long runs over their steps that a run planned now should expect."""
    run_spread: float
    """Standard deviation of that, in ln(hours)."""
    width_scale: float
    rl: Mapping[str, float]
    scored: Mapping[str, float]


@dataclass(frozen=True)
class MfuBelief:
    """ln(MFU) is normal. `effects` add up to its mean, `variances` to its variance."""

    log_mean: float
    log_sd: float
    effects: Mapping[str, float]
    variances: Mapping[str, float]

    @property
    def median(self) -> float:
        return math.exp(self.log_mean)


@cache
def coefficients() -> Coefficients:
    """The packaged coefficients.

    Raises:
        StateError: the file is from another version.
    """
    value = json.loads(COEFFICIENTS.read_text())
    if value.get("features") != list(NAMES):
        raise StateError(f"{COEFFICIENTS} is from another version; run: python -m research.estimator.fit")
    return parse_coefficients(value)


def parse_coefficients(value: Mapping[str, Any]) -> Coefficients:
    """From the JSON object."""
    posterior = Posterior(tuple(value["mean"]), tuple(tuple(line) for line in value["covariance"]))
    names = {field.name for field in fields(Coefficients)} - {"posterior"}
    return Coefficients(posterior, **{name: value[name] for name in names})


def run_weight(wall_hours: float) -> float:
    """How much of the losses of long runs a run of this length meets: 0 at once, 1 after weeks."""
    return -math.expm1(-wall_hours / _LONG_RUN_HOURS)


def mfu_belief(work: Workload, weight: float = 1.0, known: Coefficients | None = None) -> MfuBelief:
    """What to expect of `work`.

    Args:
        weight: run_weight of its length; 1 for a long run, 0 for a measured step.
        known: other coefficients than the packaged ones.
    """
    known = known or coefficients()
    values = features(work, weight * known.run_share)
    x = [values[name] for name in NAMES]
    effects = {name: b * v for name, b, v in zip(NAMES, known.posterior.mean, x, strict=True) if v}
    if work.precision in SLOWER:
        effects["precision"] = math.log(SLOWER[work.precision])
    mean = math.fsum(effects.values())
    # A second forward pass takes part of what can be reached.
    most = math.log(
        _REACHABLE * (2.0 if work.precision == "fp8" else 1.0) / (4 / 3 if work.recompute == "full" else 1)
    )
    variances = _variances(known, work, x, weight)
    return MfuBelief(min(mean, most), math.sqrt(math.fsum(variances.values())), effects, variances)


def _variances(known: Coefficients, work: Workload, x: list[float], weight: float) -> dict[str, float]:
    """By source, already widened to what left-out families showed."""
    scale = known.width_scale**2
    level, attention = shared_effects(work, known.family_sd)
    return {
        "software stack and its tuning": scale * level**2,
        "attention kernel": scale * attention**2,
        "between runs of one team": scale * (known.noise_sd**2 + weight * known.run_noise_sd**2),
        "few published runs like this one": scale * known.posterior.variance(x),
        "what goes wrong in a long run": (weight * known.run_spread) ** 2,
    }
