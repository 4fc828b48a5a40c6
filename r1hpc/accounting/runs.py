"""What the budget and the report's page need to know of each run, from its folder.

    runs = [look_into(run, now) for run in all_runs(root)]
    runs[0].used, runs[0].parts["lost"], runs[0].to_come

Hours here are GPU-hours, for a CPU run node-hours: see RunHours.unit.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.accounting.forecast import NOTHING, Spread, by_progress, remaining, until_limit
from r1hpc.accounting.review import owner
from r1hpc.attempt.state import Situation, State, all_slurm_jobs, look
from r1hpc.base.choose_run import full_name
from r1hpc.base.errors import StateError
from r1hpc.base.files import read_json
from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.summary import AttemptSummary, RunSummary, summarise_run

PARTS = ("useful", "lost", "start-up", "save", "idle")
"""Where the hours of an attempt go; they add up to all it held."""
_LEAST_PROGRESS = 0.05
"""Below this share of its steps a run's own speed says less than its estimate."""
_WAITING = (State.queued, State.requeued)


@dataclass(frozen=True)
class AttemptHours:
    """One attempt."""

    attempt: int
    cause: str
    """`running` while it does."""
    start: float
    end: float
    width: int
    """GPUs, or nodes of a CPU run: what its wall time is multiplied by."""
    parts: dict[str, float]
    """Hours by PARTS."""
    wait_s: float | None
    """From the submission, or the end of the attempt before, until it began."""

    @property
    def hours(self) -> float:
        return sum(self.parts.values())

    def within(self, start: float, end: float) -> "AttemptHours | None":
        """The part of it between two times, its hours in proportion; None: there is none."""
        first, last = max(self.start, start), min(self.end, end)
        if last <= first:
            return None
        share = (last - first) / (self.end - self.start)
        parts = {part: hours * share for part, hours in self.parts.items()}
        return replace(self, start=first, end=last, parts=parts)


@dataclass(frozen=True)
class RunHours:
    """One run: planned, used, useful, wasted, and still to come."""

    run: RunDir
    situation: Situation
    summary: RunSummary
    user: str
    stage: str
    job_name: str
    unit: str
    """GPU-hours or node-hours."""
    attempts: tuple[AttemptHours, ...]
    planned: Spread | None
    """The estimate stored at submission."""
    num_steps: int | None
    ceiling: float | None
    """GPUs x time limit of one attempt, in hours."""
    waiting_since: float | None = None
    jobs: tuple[str, ...] = ()
    """Every Slurm job id it has had."""

    @property
    def run_id(self) -> str:
        """Of a stage of a chain CHAIN/STAGE."""
        return full_name(self.run)

    @property
    def state(self) -> str:
        return self.situation.state.value

    @property
    def start(self) -> float:
        """When its first attempt began; before that when it was submitted, or its folder was made."""
        if self.attempts:
            return self.attempts[0].start
        return self.waiting_since or self.run.path.stat().st_mtime

    @property
    def end(self) -> float:
        return self.attempts[-1].end if self.attempts else self.start

    @property
    def used(self) -> float:
        return sum(each.hours for each in self.attempts)

    @property
    def parts(self) -> dict[str, float]:
        return {part: sum(each.parts[part] for each in self.attempts) for part in PARTS}

    @property
    def is_live(self) -> bool:
        return self.situation.state in (State.running, *_WAITING)

    @property
    def share_done(self) -> float | None:
        last = self.summary.steps.last
        return last.global_step / self.num_steps if last and self.num_steps else None

    @property
    def to_come(self) -> Spread:
        """Hours that the run will still use."""
        if not self.is_live:
            return NOTHING
        if self.share_done is not None and self.used > 0 and self.share_done >= _LEAST_PROGRESS:
            return by_progress(self.used, min(1.0, self.share_done))
        if self.planned is not None:
            return remaining(self.planned, self.used)
        return NOTHING if self.ceiling is None else until_limit(max(0.0, self.ceiling - self._used_now))

    @property
    def _used_now(self) -> float:
        """By the attempt that runs: the time limit is of one."""
        is_running = self.situation.state is State.running and self.attempts
        return self.attempts[-1].hours if is_running else 0.0

    @property
    def ratio(self) -> float | None:
        """Used over planned (P50), once the run finished."""
        known = self.planned is not None and self.planned.p50 > 0 and self.used > 0
        finished = self.situation.state is State.finished
        return self.used / self.planned.p50 if finished and known and self.planned else None

    @property
    def mfu(self) -> float | None:
        """Mean over the steps that lasted, by their time."""
        steps = self.summary.steps.effective.values()
        known = [(s.mfu, s.step_time_s) for s in steps if s.mfu is not None and s.step_time_s]
        seconds = sum(time for _, time in known)
        return sum(mfu * time for mfu, time in known) / seconds if seconds else None


def look_into(run: RunDir, now: float) -> RunHours:
    """Everything about one run."""
    situation = look(run)
    summary = summarise_run(run, situation.history, now, situation.state is State.running)
    plan = _read(run.plan)
    on_cpu = not any(a.attempt.gpus for a in summary.attempts)
    on_cpu = on_cpu and (bool(summary.attempts) or plan.get("gpu_hours_ceiling") == 0)
    config = run.config.read_text(errors="replace") if run.config.is_file() else ""
    submissions = sorted(float(s["time"]) for s in situation.history.submissions if "time" in s)
    job_name = re.search(r"^  job_name: (?!null)['\"]?([^'\"\n]+)", config, re.M)
    key = "node_hours_ceiling" if on_cpu else "gpu_hours_ceiling"
    return RunHours(
        run=run,
        situation=situation,
        summary=summary,
        user=owner(run),
        stage=summary.stage,
        job_name=job_name[1] if job_name else run.run_id,
        unit="node-hours" if on_cpu else "GPU-hours",
        attempts=tuple(_attempts(summary, submissions, on_cpu)),
        planned=read_estimate(run.path / "estimate.json", "node_hours" if on_cpu else "gpu_hours"),
        num_steps=_positive(plan.get("num_steps")),
        ceiling=_positive(plan.get(key)),
        waiting_since=submissions[-1] if submissions else None,
        jobs=tuple(all_slurm_jobs(run)),
    )


def clip(runs: Sequence[RunHours], start: float | None, end: float | None) -> list[RunHours]:
    """The runs with what they held between two times; those that held nothing then are left out."""
    window = (start or 0.0, float("inf") if end is None else end)
    told = []
    for run in runs:
        attempts = tuple(part for each in run.attempts if (part := each.within(*window)))
        told += [replace(run, attempts=attempts)] if attempts else []
    return told


def read_estimate(path: Path, key: str = "gpu_hours") -> Spread | None:
    """The hours stored at submission: {"gpu_hours": {"p10", "p50", "p90"}}; None where there are none.

    Args:
        key: gpu_hours, or node_hours of a CPU run.
    """
    found = _read(path).get(key)
    try:
        return Spread(*(float(found[key]) for key in ("p10", "p50", "p90"))) if found else None
    except (KeyError, TypeError, ValueError, AssertionError):
        return None


def _attempts(summary: RunSummary, submissions: Sequence[float], on_cpu: bool) -> Iterator[AttemptHours]:
    before: float | None = None
    for each in summary.attempts:
        attempt = each.attempt
        width = attempt.nodes if on_cpu else attempt.gpus
        asked = [time for time in submissions if time <= attempt.start]
        since = max([*asked[-1:], *([before] if before is not None else [])], default=None)
        yield AttemptHours(
            attempt=attempt.attempt,
            cause=attempt.cause.value if attempt.cause else "running",
            start=attempt.start,
            end=each.end,
            width=width,
            parts={part: width * seconds / 3600 for part, seconds in _seconds(each).items()},
            wait_s=None if since is None else max(0.0, attempt.start - since),
        )
        before = each.end


def _seconds(each: AttemptSummary) -> dict[str, float]:
    """Seconds by PARTS, which add up to the attempt's wall time."""
    time = each.time
    known = (time.useful_s, time.lost_s, time.startup_s, time.save_s)
    scale = min(1.0, time.wall_s / sum(known)) if sum(known) > 0 else 0.0
    scaled = [seconds * scale for seconds in known]
    return dict(zip(PARTS, [*scaled, max(0.0, time.wall_s - sum(scaled))], strict=True))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; empty where there is none, or another program's."""
    try:
        value = read_json(path)
    except (FileNotFoundError, StateError):
        return {}
    return value if isinstance(value, dict) else {}


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and value > 0 else None
