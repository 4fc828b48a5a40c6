"""What a site's own finished runs say of the estimates: their ratios of actual to estimated hours.

    found = correction("A100-SXM4-80GB", runs)      # FinishedRun, oldest first: see calibrate
    hours = found.apply(Spread(80, 100, 150))       # the estimate, corrected
    print(found.basis)

For each finished run, y = ln(actual hours / estimated P50 before any correction). From REPLACES_AT runs on
their ratios are all there is: the median of y is the site's factor, and the predictive distribution of the
next y (Student's t, since the spread is estimated too) gives P10 and P90. Before that the logarithms of the
estimate's own quantiles and of the site's are blended by the weight that a normal prior of the estimate's
width gives to n runs (a conjugate normal model; Gelman et al., Bayesian Data Analysis, chapter 2.5).

GPU-hours for each type of GPU; node-hours for CPU runs. The actual is Slurm's own (sacct -D, all attempts)
where it can be asked, else the run's own record. A run fed by the stub library for NVML never enters.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.accounting.forecast import TYPICAL_FACTOR, Spread

CPU = "cpu"
"""The resource of runs without GPUs, which cost node-hours."""
REPLACES_AT = 5
"""Finished runs from which on the estimate's own interval counts no more."""
MOST_RUNS = 30
"""Only the newest: clusters, drivers and habits change."""
RUN_SPREAD = 0.16
"""Standard deviation of y within a site, assumed before it is known and worth one run afterwards. ln MFU of
whole runs spreads by 0.16 within Pythia's eight and by 0.07 within LLaMA-1's four (published GPU-hours)."""
_Z90 = statistics.NormalDist().inv_cdf(0.9)
_T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
"""Student's t, 0.9, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that finished, as estimated and as it was. Hours are GPU-hours, for CPU runs node-hours."""

    run_id: str
    resource: str
    """The GPU's name, or CPU."""
    finished_at: float
    estimate: Spread
    """As the estimator said, before any correction."""
    actual: float
    source: str
    """sacct, or run: the run's own record."""

    @property
    def log_ratio(self) -> float:
        return math.log(self.actual / self.estimate.p50)


@dataclass(frozen=True)
class Correction:
    """What to do with the next estimate for a resource."""

    resource: str
    num_runs: int
    weight: float
    """Of the site's ratios, 0 to 1; the estimate's own interval has the rest."""
    factor_p10: float
    factor_p50: float
    factor_p90: float
    """The site's quantiles, as multiples of the estimate's P50."""

    @property
    def basis(self) -> str:
        if not self.num_runs:
            return f"no finished run on {self.resource} yet: the estimate is as published runs have it"
        runs = f"{self.num_runs} finished run{'s' if self.num_runs > 1 else ''} on {self.resource}"
        factors = f"x {self.factor_p50:.2f} (P10 x {self.factor_p10:.2f}, P90 x {self.factor_p90:.2f})"
        if self.weight == 1:
            return f"{factors}, from {runs} at this site, in place of the published prior"
        return f"{factors}, from {runs} at this site, at a weight of {self.weight:.0%} beside the prior"

    def apply(self, estimate: Spread) -> Spread:
        """The corrected quantiles."""
        if not self.weight or estimate.p50 <= 0:
            return estimate
        own = (estimate.p10, estimate.p50, estimate.p90)
        factors = (self.factor_p10, self.factor_p50, self.factor_p90)
        blended = [
            max(quantile, 1e-9 * estimate.p50) ** (1 - self.weight) * (factor * estimate.p50) ** self.weight
            for quantile, factor in zip(own, factors, strict=True)
        ]
        return Spread(*sorted(blended))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "basis": self.basis}


def correction(resource: str, runs: Sequence[FinishedRun]) -> Correction:
    """From runs of one resource, oldest first."""
    newest = runs[-MOST_RUNS:]
    if not newest:
        return Correction(resource, 0, 0.0, 1.0, 1.0, 1.0)
    logs = [run.log_ratio for run in newest]
    num, centre, mean = len(logs), statistics.median(logs), statistics.fmean(logs)
    spread = math.sqrt((RUN_SPREAD**2 + sum((y - mean) ** 2 for y in logs)) / num)
    # The next run's own spread, and that of the centre: the variance of a median is pi / 2 that of a mean.
    reach = _student_90(num) * spread * math.sqrt(1 + math.pi / 2 / num)
    return Correction(
        resource=resource,
        num_runs=num,
        weight=1.0 if num >= REPLACES_AT else num / (num + _runs_the_prior_is_worth(newest)),
        factor_p10=math.exp(centre - reach),
        factor_p50=math.exp(centre),
        factor_p90=math.exp(centre + reach),
    )


@dataclass(frozen=True)
class Scored:
    """A run beside its estimate, and beside that estimate corrected by the runs before it alone."""

    run: FinishedRun
    corrected: Spread
    num_before: int

    @property
    def error_before(self) -> float:
        return abs(self.run.estimate.p50 / self.run.actual - 1)

    @property
    def error_after(self) -> float:
        return abs(self.corrected.p50 / self.run.actual - 1)

    @property
    def ratio(self) -> float:
        return self.run.actual / self.run.estimate.p50

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.run),
            "ratio": self.ratio,
            "corrected": self.corrected.to_json(),
            "num_before": self.num_before,
            "error_before": self.error_before,
            "error_after": self.error_after,
        }


def score(runs: Sequence[FinishedRun]) -> list[Scored]:
    """Each run judged by what was known before it finished; runs of one resource, oldest first."""
    return [
        Scored(run, correction(run.resource, runs[:i]).apply(run.estimate), i) for i, run in enumerate(runs)
    ]


@dataclass(frozen=True)
class Quality:
    """How good forecasts were, over some runs."""

    median_error: float
    """Of |P50 / actual - 1|."""
    median_width: float
    """Of P90 / P10."""
    num_inside: int
    """Runs between P10 and P90; four out of five should be."""


@dataclass(frozen=True)
class Effect:
    """The estimates as they were, and corrected, over the runs that had one before them."""

    num_runs: int
    before: Quality
    after: Quality


def effect(scored: Sequence[Scored]) -> Effect | None:
    """None where no run had one before it."""
    judged = [each for each in scored if each.num_before]
    if not judged:
        return None
    actual = [each.run.actual for each in judged]
    before = _quality([each.run.estimate for each in judged], actual)
    return Effect(len(judged), before, _quality([each.corrected for each in judged], actual))


def _quality(forecasts: Sequence[Spread], actual: Sequence[float]) -> Quality:
    pairs = list(zip(forecasts, actual, strict=True))
    return Quality(
        median_error=statistics.median(abs(forecast.p50 / hours - 1) for forecast, hours in pairs),
        median_width=statistics.median(f.p90 / max(f.p10, 1e-9 * f.p90) for f in forecasts),
        num_inside=sum(forecast.p10 <= hours <= forecast.p90 for forecast, hours in pairs),
    )


def _runs_the_prior_is_worth(runs: Sequence[FinishedRun]) -> float:
    """The ratio of the variances: of runs within a site, and of sites around the estimate."""
    widths = [math.log(run.estimate.p90 / max(run.estimate.p10, 1e-9 * run.estimate.p90)) for run in runs]
    width = statistics.median(widths) / (2 * _Z90)
    return (RUN_SPREAD / (width or math.log(TYPICAL_FACTOR) / _Z90)) ** 2


def _student_90(freedom: int) -> float:
    """0.9 quantile of Student's t: a table, then Cornish and Fisher's expansion (error below 0.001)."""
    if freedom <= len(_T90):
        return _T90[freedom - 1]
    return _Z90 + (_Z90**3 + _Z90) / (4 * freedom)
