"""How long Slurm's warning is, whether a save fits into it, and how often to save.

Facts from Slurm's documentation (slurm.conf(5), sbatch(1), preempt.html) and source (24.05):
GraceTime is the partition's or the QOS's and no flag of the user's lengthens it. At its start the job's
steps get SIGTERM (or, with PreemptParameters=send_user_signal, the signal of --signal in its place); at its
end SIGTERM again, and SIGKILL after KillWait. With GraceTime 0 only KillWait is left.
"""

import math
from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.base.units import GIB, format_duration

_FIXED_SAVE_S = 5.0
"""Assumed, not measured: barriers, small files, fsync and rename of a save, whatever its size."""
_STEP_ALLOWANCE_S = 30
"""Assumed: the step that is running when the signal comes is finished first."""
_MARGIN = 2.0
_LEAST_LEAD_S = 60
_MOST_LEAD_S = 65535
"""sbatch(1), --signal: the largest it takes."""
_UNKNOWN_SAVE_S = 135.0
"""Where the model's size is not known yet; makes the usual warning of 300 s."""


@dataclass(frozen=True)
class WarningWindow:
    """Seconds between the first signal and the end, at the time limit and at a preemption."""

    timeout_s: int
    preemption_s: int | None
    """None: the partition preempts nobody, or suspends instead of killing."""
    source: str
    """Where the preemption window comes from, as printed."""


def expected_save_time_s(
    checkpoint_bytes: int, bandwidth_gib_s: float, measured_s: float | None = None
) -> float:
    """Seconds a save takes: as measured on this run if it was, else size over bandwidth plus a fixed part."""
    if measured_s is not None:
        return measured_s
    return _FIXED_SAVE_S + checkpoint_bytes / GIB / bandwidth_gib_s


def warning_window(
    *, preempt_mode: str, grace_s: int, kill_wait_s: int, sends_user_signal: bool, signal_lead_s: int
) -> WarningWindow:
    """The windows that a cluster's settings give a run. `preempt_mode` as Slurm prints it."""
    modes = set(preempt_mode.upper().replace(" ", "").split(","))
    if not modes & {"REQUEUE", "CANCEL"}:
        return WarningWindow(signal_lead_s, None, f"PreemptMode={preempt_mode.upper()}")
    if grace_s <= 0:
        return WarningWindow(signal_lead_s, kill_wait_s, "GraceTime is 0: only KillWait")
    signal = "USR2 (send_user_signal)" if sends_user_signal else "SIGTERM"
    return WarningWindow(signal_lead_s, grace_s, f"{signal}, then GraceTime")


def judge_window(
    save_time_s: float,
    *,
    preempt_mode: str,
    grace_s: int,
    kill_wait_s: int,
    sends_user_signal: bool,
    signal_lead_s: int,
    requeue_allowed: bool,
    max_batch_requeue: int,
    save_every: int | None = None,
) -> list[str]:
    """What a person should know at submit time about losing work, one sentence per line.

    Args:
        save_time_s: expected or measured seconds of one save.
        grace_s, kill_wait_s: GraceTime of the partition or QOS, and KillWait.
        signal_lead_s: the N of --signal=USR2@N.
        requeue_allowed: JobRequeue=1 or --requeue.
        max_batch_requeue: MaxBatchRequeue.
        save_every: steps between periodic saves, for the loss named; None: "checkpoint.save_every".
    """
    window = warning_window(
        preempt_mode=preempt_mode,
        grace_s=grace_s,
        kill_wait_s=kill_wait_s,
        sends_user_signal=sends_user_signal,
        signal_lead_s=signal_lead_s,
    )
    lost = f"up to {save_every if save_every is not None else 'checkpoint.save_every'} steps"
    lines = [
        f"time limit: USR2 {signal_lead_s} s before it; "
        + _verdict(save_time_s, signal_lead_s, f"a timed-out run loses {lost} since its last periodic save")
    ]
    lines += _preemption_lines(window, save_time_s, preempt_mode.upper(), grace_s, kill_wait_s, lost)
    if window.preemption_s is not None:
        lines += _requeue_lines(preempt_mode.upper(), grace_s, requeue_allowed, max_batch_requeue)
    return lines


def signal_lead_s(asked: int | None, save_time_s: float | None, time_limit_s: int | None) -> int:
    """The N of --signal=USR2@N: as asked for, else chosen. `save_time_s` None: the model is not known yet.

    Raises:
        UsageError: what is asked for is no time before the limit.
    """
    if asked is None:
        return choose_signal_lead_s(save_time_s or _UNKNOWN_SAVE_S, time_limit_s)
    if not 0 < asked < (time_limit_s or _MOST_LEAD_S + 1):
        raise UsageError(f"resources.signal_lead_s is {asked}: it must lie between 1 and the time limit")
    return asked


def choose_signal_lead_s(save_time_s: float, time_limit_s: int | None) -> int:
    """The N of --signal=USR2@N: a step and twice the save, at least 60 s, at most a quarter of the limit.

    Slurm may send it up to 60 s earlier still (sbatch(1), --signal). The quarter wins: a short job
    (a test of a few minutes) must work most of its time, and its saves are small.
    """
    wanted = max(_LEAST_LEAD_S, math.ceil(_STEP_ALLOWANCE_S + _MARGIN * save_time_s))
    most = _MOST_LEAD_S if time_limit_s is None else min(_MOST_LEAD_S, time_limit_s // 4)
    return max(1, min(wanted, most))


def optimal_save_interval_s(save_time_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that lose least: sqrt(2 x save x MTBF), at most the MTBF.

    Young, CACM 17(9), 1974; the first order of Daly, FGCS 22(3), 2006, whose bound is the MTBF.
    """
    return min(math.sqrt(2 * save_time_s * mtbf_s), mtbf_s)


def _preemption_lines(
    window: WarningWindow, save_time_s: float, mode: str, grace_s: int, kill_wait_s: int, lost: str
) -> list[str]:
    if window.preemption_s is None:
        if "SUSPEND" in mode or "GANG" in mode:
            return [f"preemption ({mode}): the run is suspended and goes on later; nothing to save"]
        return [f"preemption ({mode}): nobody preempts this run"]
    loss = (
        f"a preempted run loses {lost} since its last periodic save; save more often (checkpoint.save_every)"
    )
    until = (
        f"{window.source}: {grace_s} s, then {kill_wait_s} s (KillWait) until SIGKILL"
        if grace_s > 0
        else f"{window.source}, {kill_wait_s} s from SIGTERM to SIGKILL"
    )
    return [f"preemption ({mode}): {until}; {_verdict(save_time_s, window.preemption_s, loss)}"]


def _verdict(save_time_s: float, window_s: int, loss: str) -> str:
    expected = f"a save is expected to take {format_duration(save_time_s)}"
    if save_time_s * _MARGIN <= window_s:
        return f"{expected}: OK"
    if save_time_s <= window_s:
        return f"{expected}: TIGHT, the step that is running must end first"
    return f"{expected}: NOT ENOUGH; {loss}"


def _requeue_lines(mode: str, grace_s: int, requeue_allowed: bool, max_batch_requeue: int) -> list[str]:
    if not requeue_allowed:
        return ["requeue: not allowed (JobRequeue=0 or --no-requeue): submit it again yourself"]
    if "REQUEUE" not in mode:
        if grace_s <= 0:
            return ["requeue: not by Slurm (PreemptMode=CANCEL): submit it again yourself"]
        return ["requeue: not by Slurm (PreemptMode=CANCEL): the job asks for it within GraceTime"]
    if grace_s <= 0:
        return []
    return [
        f"requeue: by Slurm. A job that leaves by itself inside GraceTime is held after {max_batch_requeue} "
        "times (MaxBatchRequeue); this one asks for its requeue itself, which does not count"
    ]
