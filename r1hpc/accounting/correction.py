"""Correct an estimate by a site's own finished runs: their ratios of actual to estimated hours.

For a finished run y = ln(actual hours / estimated P50 before any correction), and y = f + e: f is the error
of estimates for runs like it at this site, e the difference from one run to the next. f is a Gaussian process
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equations 2.22 to 2.24) with mean 0
and

    cov(f, f') = tau tau' c,  c = exp(-d^2 / 2) for runs of one stage, 0 for others
    d^2        = (ln(hours / hours') / SCALE)^2 + (ln(params / params') / SCALE)^2
    var(e)     = s^2 (1 + SETTLING_HOURS / useful wall hours)

tau^2 is the variance of the estimate's own interval without the differences between runs. Runs just like the
planned one are therefore blended with the published prior as in the conjugate normal model (Gelman et al.,
Bayesian Data Analysis, chapter 2.5): n of them weigh tau^2 / (tau^2 + s^2 / n). Runs that are far away weigh
nothing, for the middle and for the band. s^2 is estimated too, from RUN_SPREAD before any run is known. One
odd run moves the middle no more than a run at CLIP robust deviations would; the band uses all of it.

If a run's useful time is short, or a small part of it, the run measures start-up, not MFU. It corrects only
the estimates of runs about as short. calibrate.py collects the runs; `score` and `effect` show how good the
earlier corrections were.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from r1hpc.base.records import Amount, Between, Count, Time
from r1hpc.plan.hours.spread import TYPICAL_FACTOR, Z90, Spread

CPU = "cpu"
"""The resource of runs without GPUs, which cost node-hours."""
MOST_RUNS = 30
"""Only the newest of the near runs: clusters, drivers and habits change."""
RUN_SPREAD = 0.16
"""Standard deviation of e before it is known. ln MFU of complete runs spreads by 0.16 within Pythia's eight
and by 0.07 within LLaMA-1's four (published GPU-hours)."""
RUN_SPREAD_WORTH = 1.0
"""Number of runs that RUN_SPREAD counts for in the estimate of s^2. Chosen: a site soon shows its own."""
SCALE = math.log(10)
"""Chosen: a run of ten times the hours has a correlation of 0.61, one of a hundred times 0.14. Published
families allow more: Pythia's eight runs err alike, within 0.09, over a factor of 140 in hours."""
LEAST_CLOSENESS = 0.01
SETTLING_HOURS = 0.25
"""A run with this much useful wall time has twice the variance of a long one. Chosen: compilation, caches and
the last save weigh on short runs."""
CLIP = 2.0
STARTUP_MINUTES = 5.0
"""A run with less useful wall time is start-up: nothing in it has settled."""
STARTUP_SHARE = 0.5
"""So is one with a smaller part of its time useful."""
STARTUP_REACH = 3.0
"""Start-up runs correct estimates of up to this many times their own estimated wall time."""


@dataclass(frozen=True)
class Planned:
    """A run as estimated, and what decides which finished runs are like it."""

    resource: str
    """The GPU's name, or CPU."""
    stage: str
    estimate: Spread
    """GPU-hours (for CPU runs node-hours) as estimated, before any correction."""
    num_gpus: Count = 0
    """0 on CPUs, or if unknown."""
    num_nodes: Count = 0
    """For CPU runs."""
    params: Amount | None = None
    """None: unknown."""

    @property
    def wall_hours(self) -> float | None:
        """Return the expected wall hours; None if the number of GPUs or nodes is unknown."""
        width = self.num_gpus or self.num_nodes
        return self.estimate.p50 / width if width else None

    @property
    def is_startup(self) -> bool:
        """True if so little useful time is expected that start-up dominates."""
        return self.wall_hours is not None and self.wall_hours * 60 * STARTUP_SHARE < STARTUP_MINUTES


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Planned):
    """A finished run, estimated and actual. Hours are GPU-hours, for CPU runs node-hours."""

    run_id: str
    finished_at: Time
    hours: Annotated[float, Between(1e-12, 1e12)]
    """All attempts together."""
    source: str
    """sacct, or run: the run's own record."""
    useful_share: Amount
    """Part of the hours in steps that counted, 0 to 1."""
    num_nodes: Count = 1

    @property
    def useful_wall_hours(self) -> float:
        return self.hours * self.useful_share / (self.num_gpus or self.num_nodes)

    @property
    def is_startup(self) -> bool:
        """True if so little of its time was useful that start-up dominates."""
        return self.useful_share < STARTUP_SHARE or self.useful_wall_hours * 60 < STARTUP_MINUTES


@dataclass(frozen=True)
class Correction:
    planned: Planned
    num_runs: int
    """Finished runs near enough to count."""
    num_others: int
    """Runs on the same resource with another stage or size, or mostly start-up."""
    weight: float
    """The part of the uncertainty about this site that they have removed, 0 to 1."""
    factor: float
    """On P50."""
    width: float
    """On ln(P90 / P50) and ln(P50 / P10)."""

    @property
    def corrected(self) -> Spread:
        known = self.planned.estimate
        if not self.num_runs or known.p50 <= 0:
            return known
        middle = known.p50 * self.factor
        low, high = ((quantile / known.p50) ** self.width for quantile in (known.p10, known.p90))
        return Spread(middle * low, middle, middle * high)

    @property
    def basis(self) -> str:
        """Return the correction in one line."""
        stage, resource = self.planned.stage or "finished", self.planned.resource
        others = f"; {self.num_others} of another stage or size do not count" if self.num_others else ""
        if not self.num_runs:
            return f"no finished {stage} run of this size on {resource} yet: the estimate stays{others}"
        runs = f"{self.num_runs} {stage} run{'s' * (self.num_runs > 1)} of this size on {resource}"
        low, middle, high = self._factors()
        return (
            f"x {middle:.2f} (P10 x {low:.2f}, P90 x {high:.2f}), from {runs} at this site, with weight "
            f"{self.weight:.0%} against the prior{others}"
        )

    def to_json(self) -> dict[str, Any]:
        factors = zip(("factor_p10", "factor_p50", "factor_p90"), self._factors(), strict=True)
        return {
            "resource": self.planned.resource,
            "stage": self.planned.stage,
            "num_runs": self.num_runs,
            "num_others": self.num_others,
            "weight": self.weight,
            **dict(factors),
            "basis": self.basis,
        }

    def _factors(self) -> tuple[float, float, float]:
        """Return the corrected quantiles as multiples of the estimate's P50."""
        found, middle = self.corrected, self.planned.estimate.p50 or 1.0
        return found.p10 / middle, found.p50 / middle, found.p90 / middle


def correction(planned: Planned, runs: Sequence[FinishedRun]) -> Correction:
    """Compute the correction from finished runs, oldest first; those on other resources are ignored."""
    here = [run for run in runs if run.resource == planned.resource and run.estimate.p50 > 0]
    alike = [
        run
        for run in here
        if run.stage == planned.stage
        and _is_comparable(run, planned)
        and _closeness(planned, run) >= LEAST_CLOSENESS
    ]
    near = alike[-MOST_RUNS:]
    others = len(here) - len(near)
    if not near:
        return Correction(planned, 0, others, 0.0, 1.0, 1.0)
    tau2 = _site_variance(planned.estimate)
    closeness = [_closeness(planned, run) for run in near]
    votes = [c * c for c in closeness]
    logs = [math.log(run.hours / run.estimate.p50) for run in near]
    clipped = _clipped(logs, votes)
    variance = _run_variance(clipped, votes)
    settling = [1.0 if run.is_startup else 1 + SETTLING_HOURS / run.useful_wall_hours for run in near]
    noise2 = [variance * factor for factor in settling]
    middle, rest2 = _posterior(planned, near, clipped, noise2)
    before = math.sqrt(tau2 + RUN_SPREAD**2)
    after = math.sqrt(rest2 + _run_variance(logs, votes))
    return Correction(planned, len(near), others, 1 - rest2 / tau2, math.exp(middle), after / before)


def _is_comparable(run: FinishedRun, planned: Planned) -> bool:
    """True unless one is a start-up run and the other is much longer.

    Judged by the estimates of both, so that an estimate that is far off can still be corrected.
    """
    ours, theirs = planned.wall_hours, run.wall_hours or math.inf
    if run.is_startup:
        return ours is not None and ours <= STARTUP_REACH * theirs
    return ours is None or not planned.is_startup or ours >= theirs / STARTUP_REACH


def _closeness(one: Planned, other: Planned) -> float:
    """Return c of the module's docstring, for runs of one stage."""
    distances = [math.log(one.estimate.p50 / other.estimate.p50)] if one.estimate.p50 > 0 else [math.inf]
    if one.params and other.params:
        distances.append(math.log(one.params / other.params))
    return math.exp(-math.fsum((distance / SCALE) ** 2 for distance in distances) / 2)


def _site_variance(estimate: Spread) -> float:
    """Return tau^2: the variance of ln(hours) in the estimate, without the differences between runs."""
    width = math.log(estimate.p90 / max(estimate.p10, 1e-9 * estimate.p90))
    whole = (width / (2 * Z90)) ** 2 or (math.log(TYPICAL_FACTOR) / Z90) ** 2
    return max(whole - RUN_SPREAD**2, whole / 2)


def _run_variance(logs: Sequence[float], votes: Sequence[float]) -> float:
    """Return s^2: the mean of its posterior (scaled inverse chi-squared; Gelman et al., chapter 2.6).

    A run's vote is the square of its closeness, the part of its variance shared with the planned run.
    """
    centre = _weighted_median(logs, votes)
    squares = math.fsum(vote * (y - centre) ** 2 for vote, y in zip(votes, logs, strict=True))
    freedom = max(0.0, math.fsum(votes) - 1)
    return (RUN_SPREAD_WORTH * RUN_SPREAD**2 + squares) / (RUN_SPREAD_WORTH + freedom)


def _clipped(logs: Sequence[float], votes: Sequence[float]) -> list[float]:
    """Winsorise at CLIP deviations (1.4826 times the median absolute one) from the median."""
    centre = _weighted_median(logs, votes)
    deviation = 1.4826 * _weighted_median([abs(y - centre) for y in logs], votes)
    reach = CLIP * max(deviation, RUN_SPREAD)
    return [min(max(y, centre - reach), centre + reach) for y in logs]


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted median; halfway between the two middle values if the weights meet exactly there."""
    ordered = sorted(zip(values, weights, strict=True))
    half, seen = math.fsum(weights) / 2, 0.0
    for i, (value, weight) in enumerate(ordered):
        seen += weight
        if math.isclose(seen, half) and i + 1 < len(ordered):
            return (value + ordered[i + 1][0]) / 2
        if seen >= half:
            return value
    return ordered[-1][0]


def _posterior(
    planned: Planned, runs: Sequence[FinishedRun], logs: Sequence[float], noise2: Sequence[float]
) -> tuple[float, float]:
    """Return mean and variance of f at `planned` (Rasmussen and Williams, equations 2.23 and 2.24)."""
    sized = [(math.sqrt(_site_variance(run.estimate)), run) for run in runs]
    tau = math.sqrt(_site_variance(planned.estimate))
    across = [tau * t * _closeness(planned, place) for t, place in sized]
    covariance = [[t * u * _closeness(p, q) for u, q in sized] for t, p in sized]
    for i, noise in enumerate(noise2):
        covariance[i][i] += noise
    by_run = _solve(covariance, across)
    middle = math.fsum(a * y for a, y in zip(by_run, logs, strict=True))
    return middle, max(0.0, tau**2 - math.fsum(a * k for a, k in zip(by_run, across, strict=True)))


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve matrix x = right by Gaussian elimination; a positive definite matrix needs no pivots."""
    size = len(right)
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for i in range(size):
        for j in range(i + 1, size):
            factor = lines[j][i] / lines[i][i]
            lines[j] = [a - factor * b for a, b in zip(lines[j], lines[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = math.fsum(lines[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (lines[i][size] - known) / lines[i][i]
    return found


@dataclass(frozen=True)
class Scored:
    """A run with its estimate, and with that estimate corrected only by the runs before it."""

    run: FinishedRun
    corrected: Spread
    num_before: int
    """Runs before it that are near enough to count."""

    @property
    def error_before(self) -> float:
        return abs(self.run.estimate.p50 / self.run.hours - 1)

    @property
    def error_after(self) -> float:
        return abs(self.corrected.p50 / self.run.hours - 1)

    @property
    def ratio(self) -> float:
        return self.run.hours / self.run.estimate.p50

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.run),
            "actual": self.run.hours,
            "ratio": self.ratio,
            "corrected": self.corrected.to_json(),
            "num_before": self.num_before,
            "error_before": self.error_before,
            "error_after": self.error_after,
        }


def score(runs: Sequence[FinishedRun]) -> list[Scored]:
    """Judge each run by what was known before it finished; runs of one resource, oldest first."""
    found = [correction(run, runs[:i]) for i, run in enumerate(runs)]
    return [Scored(run, each.corrected, each.num_runs) for run, each in zip(runs, found, strict=True)]


@dataclass(frozen=True)
class Quality:
    median_error: float
    """|P50 / actual - 1|."""
    median_width: float
    """P90 / P10."""
    num_inside: int
    """Runs between P10 and P90; four out of five is right."""


@dataclass(frozen=True)
class Effect:
    """Quality of the original and the corrected estimates, over the runs with an earlier one."""

    num_runs: int
    before: Quality
    after: Quality


def effect(scored: Sequence[Scored]) -> Effect | None:
    """Return the effect; None if no run had an earlier one."""
    judged = [each for each in scored if each.num_before]
    if not judged:
        return None
    actual = [each.run.hours for each in judged]
    before = _quality([each.run.estimate for each in judged], actual)
    return Effect(len(judged), before, _quality([each.corrected for each in judged], actual))


def _quality(forecasts: Sequence[Spread], actual: Sequence[float]) -> Quality:
    pairs = list(zip(forecasts, actual, strict=True))
    return Quality(
        median_error=statistics.median(abs(forecast.p50 / hours - 1) for forecast, hours in pairs),
        median_width=statistics.median(f.p90 / max(f.p10, 1e-9 * f.p90) for f in forecasts),
        num_inside=sum(forecast.p10 <= hours <= forecast.p90 for forecast, hours in pairs),
    )
