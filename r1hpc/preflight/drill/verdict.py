"""Judge whether a disturbed run lost nothing, from the records of both runs alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Attempt, Cause, History
from r1hpc.telemetry.records.metrics import audit_ledger, compare, format_ranges, read_ledger, read_steps


@dataclass(frozen=True)
class Done:
    """A disturbance as it happened."""

    name: str
    attempt: int
    causes: tuple[Cause, ...] = ()
    may_lose_steps: bool = False
    refused: str | None = None
    """Why the site did not allow it; then it proves nothing."""
    way: str | None = None
    """The value of --way that it exercised."""


@dataclass(frozen=True)
class Check:
    """One promise, and whether the records show that it was kept."""

    check: str
    passed: bool
    detail: str


def judge_attempts(attempts: Sequence[Attempt], done: Sequence[Done], save_every: int) -> list[Check]:
    """Check that each disturbance ended its attempt with its own cause, and how many steps it cost."""
    by_number = {attempt.attempt: attempt for attempt in attempts}
    checks = [_judge_one(each, by_number, save_every) for each in done if each.refused is None]
    expected = len(checks) + 1
    detail = ", ".join(attempt.cause.value if attempt.cause else "no end" for attempt in attempts)
    finished = bool(attempts) and attempts[-1].cause is Cause.finished and len(attempts) == expected
    if not checks:
        checks.append(Check("disturbed at all", False, "nothing could be done to the job: nothing is proved"))
    return [*checks, Check(f"{expected} attempts, the last one finished", finished, detail)]


def _judge_one(done: Done, attempts: dict[int, Attempt], save_every: int) -> Check:
    ended = attempts[done.attempt]
    following = attempts.get(done.attempt + 1)
    lost = (ended.last_step or 0) - ((following.resumed_from or 0) if following else 0)
    allowed = save_every if done.may_lose_steps else 0
    passed = ended.cause in done.causes and following is not None and lost <= allowed
    words = f"attempt {done.attempt} ended by {ended.cause} at step {ended.last_step}"
    return Check(done.name, passed, f"{words}; {lost} steps taken again, {allowed} allowed")


def judge_records(quiet: RunDir, disturbed: RunDir) -> list[Check]:
    """Check for the same numbers to the last bit, the same data, and every sample once."""
    differences = compare(quiet, disturbed, ("loss", "grad_norm"))
    steps = len(read_steps(quiet).effective)
    seen = f"{steps} steps"
    if differences:
        first = differences[0]
        seen = (
            f"{len(differences)} differ, first step {first.global_step} {first.key}: {first.a} and {first.b}"
        )
    ours, theirs = ({n: r.data for n, r in read_ledger(run).items()} for run in (disturbed, quiet))
    audit = audit_ledger(disturbed)
    odd = [*audit.missing_steps, *audit.repeated_samples, *audit.skipped_samples]
    once = f"{audit.num_samples} samples" if audit.exactly_once else f"not once: {format_ranges(odd)}"
    same = Check("loss and gradient norm equal to the bit", bool(steps) and not differences, seen)
    if not theirs:  # a script that records no samples
        return [same]
    return [
        same,
        Check("the same data in every step", ours == theirs, f"{len(ours)} and {len(theirs)} recorded steps"),
        Check("every sample exactly once", audit.exactly_once, once),
    ]


def judge_limited(quiet: RunDir, limited: RunDir, attempts: Sequence[Attempt], limit: str) -> list[Check]:
    """Check that each attempt but the last ended at its time limit without lost steps; same numbers."""
    warned = (Cause.timeout, Cause.preempted)  # USR2 well before the limit looks like a preemption
    done = [Done(limit, each.attempt, warned) for each in attempts[:-1]]
    *ends, last = judge_attempts(attempts, done, save_every=0)
    same = [last, *judge_records(quiet, limited)]
    return [*ends, *(replace(each, check=f"{each.check} ({limit})") for each in same)]


def judge_cancel(history: History, state: str) -> Check:
    """Check that a run that was preempted and cancelled at once stays cancelled."""
    passed = history.is_newer("cancel_requested", "begin") and state == "cancelled"
    return Check("no attempt after a cancel", passed, f"{state}, {len(history.attempts)} attempts")
