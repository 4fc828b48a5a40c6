"""Decide whether a run may be started again: the limits of its causes, of idle attempts, and of its hours.

Asked at the end of an attempt and at the next begin; begin.py and may_begin.py have the other reasons not to
begin. `seconds_left` tells rank 0 when to stop.
"""

import time
from collections.abc import Sequence

from r1hpc.config.schema.run import LimitsConfig
from r1hpc.telemetry.records.attempts import AGAIN_BY_ITSELF, Attempt, Cause, History, gpu_hours_used

_LONGEST_STARTUP_S = 3600.0


def reason_to_stop(
    attempts: Sequence[Attempt], limits: LimitsConfig, *, in_parts: bool = False
) -> str | None:
    """Return why the run must not be started again after its last attempt, or None if it may.

    A finished, stopped, cancelled or refused run is over. Every other cause has its own limit, which counts
    from the last attempt that made progress. Attempts in a row without a new checkpoint are a loop that only
    wastes hours. `in_parts`: its stage makes parts and no checkpoints (plan.topology.parts).
    """
    if not attempts:
        return None
    last = attempts[-1].cause
    if last is not None and last.is_final:
        return f"the run is over: {last.value}"
    limit_of = {
        Cause.preempted: ("max_preemptions", limits.max_preemptions),
        Cause.timeout: ("max_timeouts", limits.max_timeouts),
        Cause.node_fail: ("max_node_failures", limits.max_node_failures),
        Cause.crash: ("max_crashes", limits.max_crashes),
        Cause.unknown: ("max_crashes", limits.max_crashes),
        Cause.oom: ("max_ooms", limits.max_ooms),
        Cause.hang: ("max_hangs", limits.max_hangs),
    }
    if last in limit_of:
        name, limit = limit_of[last]
        # From the newest attempt that made progress on, whose end came after it.
        count = sum(a.cause is last for a in attempts[max(0, _end_of_progress(attempts) - 1) :])
        if 0 <= limit < count:
            since = f"since the last progress, and limits.{name} is {limit}"
            return f"{count} attempts ended by {last.value} {since}"
    # New is a newer checkpoint, or more finished pieces (groups of a rollout, held-out answers) beyond the
    # same one. An attempt that the cluster ended before its first step is not the run's fault.
    idle = sum(not _ended_in_startup(attempt) for attempt in attempts[_end_of_progress(attempts) :])
    if idle >= limits.max_attempts_without_checkpoint:
        missing = "new checkpoint"
        advice = "save more often (checkpoint.save_every) or ask for more time"
        if in_parts:
            missing = "finished part"
            advice = "ask for more time, or begin a run with smaller parts (generate.items_per_part)"
        return (
            f"no {missing} in the last {idle} attempts "
            f"(limits.max_attempts_without_checkpoint={limits.max_attempts_without_checkpoint}): "
            f"read the log of the last attempt; {advice}"
        )
    return None


def out_of_hours(history: History, limits: LimitsConfig) -> str | None:
    """Return why the run may not start if it has used up its own GPU-hours, else None."""
    most, used = limits.max_gpu_hours, gpu_hours_used(history, time.time())
    if most is None or used < most:
        return None
    return f"it has used {used:.2f} GPU-hours and limits.max_gpu_hours is {most:g}"


def seconds_left(history: History, max_gpu_hours: float | None, now: float) -> float | None:
    """Return the wall seconds that the current attempt may still use of the run's allowance; None: no limit,
    or a run without GPUs."""
    this = history.last
    if max_gpu_hours is None or this is None or this.gpus == 0:
        return None
    return max(0.0, max_gpu_hours - gpu_hours_used(history, now)) * 3600 / this.gpus


def _ended_in_startup(attempt: Attempt) -> bool:
    """True if the cluster ended it before its first step, unless it lasted longer than any start-up: then it
    was in its first rollout without finishing a group."""
    if attempt.cause is Cause.cluster:  # held after a few
        return True
    is_clusters = attempt.cause in (Cause.preempted, Cause.node_fail) and attempt.first_step is None
    is_clusters = is_clusters and AGAIN_BY_ITSELF not in attempt.detail
    return is_clusters and (attempt.end or attempt.start) - attempt.start < _LONGEST_STARTUP_S


def _end_of_progress(attempts: Sequence[Attempt]) -> int:
    """Count the attempts up to the newest that made progress; 0 if none did."""
    kept_before = [0, *(attempt.kept for attempt in attempts)]
    for count in range(len(attempts), 0, -1):
        attempt, kept = attempts[count - 1], kept_before[count - 1]
        if (attempt.last_committed_step or 0, attempt.kept) > (attempt.resumed_from or 0, kept):
            return count
    return 0
