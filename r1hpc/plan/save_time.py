"""Compute how long a save takes, when Slurm must send its warning signal, and whether the save fits in.

Facts from Slurm's documentation (slurm.conf(5), sbatch(1), preempt.html) and source (24.05): GraceTime
belongs to the partition or the QOS, and no user flag lengthens it. At its start the job's steps get SIGTERM
(or, with PreemptParameters=send_user_signal, the signal of --signal instead); at its end SIGTERM again, and
SIGKILL after KillWait. With GraceTime 0 only KillWait is left.
"""

import math
from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.base.units import GIB, format_duration

_FIXED_SAVE_S = 5.0
"""Assumed, not measured: barriers, small files, fsync and rename of a save of any size."""
_STEP_ALLOWANCE_S = 30
"""Assumed: the step that is running when the signal comes is finished first."""
_MARGIN = 2.0
_LEAST_LEAD_S = 60
_MOST_LEAD_S = 65535
"""sbatch(1), --signal: the largest value."""
EARLY_S = 60.0
"""Slurm may send the warning signal this much earlier (sbatch(1), --signal)."""
SERVER_LEAVES_S = 15.0
"""Seconds from a signal to a server's end: running answers get ten seconds."""
_UNKNOWN_SAVE_S = 135.0
"""Used if the model's size is unknown so far; gives the usual warning of 300 s."""


@dataclass(frozen=True)
class SaveSpeed:
    """Speed, in GiB/s, at which all ranks together write a checkpoint."""

    gib_s: float
    source: str


ASSUMED_SPEED = SaveSpeed(1.0, "assumed: no run in this run root has saved 256 MiB or more yet")


@dataclass(frozen=True)
class PreemptionRules:
    """A cluster's preemption rules for jobs of one partition and QOS."""

    mode: str
    """PreemptMode, in upper case."""
    grace_s: int
    """GraceTime of the partition or QOS."""
    kill_wait_s: int
    sends_user_signal: bool
    max_batch_requeue: int

    @property
    def warning_window_s(self) -> int | None:
        """Return the seconds from first signal to end; None: no preemption, or only a suspension."""
        if not ends_jobs(self.mode):
            return None
        return self.grace_s if self.grace_s > 0 else self.kill_wait_s

    @property
    def source(self) -> str:
        if self.grace_s <= 0:
            return "GraceTime is 0: only KillWait"
        signal = "USR2 (send_user_signal)" if self.sends_user_signal else "SIGTERM"
        return f"{signal}, then GraceTime"


def ends_jobs(mode: str) -> bool:
    """True if a preemption under this PreemptMode ends the job, False if it pauses it or none happens.

    >>> ends_jobs("GANG,SUSPEND"), ends_jobs("REQUEUE")
    (False, True)
    """
    return bool(set(mode.replace(" ", "").upper().split(",")) & {"REQUEUE", "CANCEL"})


def expected_save_time_s(checkpoint_bytes: int, bandwidth_gib_s: float) -> float:
    """Return the seconds of a save: size over bandwidth plus a fixed part."""
    return _FIXED_SAVE_S + checkpoint_bytes / GIB / bandwidth_gib_s


def expected_copy_time_s(rank_bytes: int, *, on_gpu: bool) -> float:
    """Return the seconds training waits while each rank copies `rank_bytes` to host memory.

    Assumed, not measured: 10 GiB/s from a GPU over PCIe, 1 GiB/s within a host's memory shared by its ranks.
    """
    return rank_bytes / GIB / (10.0 if on_gpu else 1.0)


def judge_window(
    save_time_s: float | None, rules: PreemptionRules, signal_lead_s: int, save_every: int
) -> list[str]:
    """Return the user's notes at submit time about losing work, one sentence per line.

    Args:
        save_time_s: expected seconds of one save; None: unknown so far.
        signal_lead_s: the N of --signal=USR2@N.
        save_every: steps between periodic saves, to name the loss.
    """
    limit, window_s = f"time limit: USR2 {signal_lead_s} s before it", rules.warning_window_s
    if save_time_s is None:
        warned = "nobody preempts this run" if window_s is None else f"{window_s} s ({rules.source})"
        return [
            f"{limit}; preemption ({rules.mode}): {warned}",
            "how long a save takes is not known before the dataset is",
        ]
    lost = f"loses up to {save_every} steps since its last periodic save"
    timed_out = _verdict(save_time_s, signal_lead_s, f"a timed-out run {lost}")
    if window_s is None:
        return [f"{limit}; {timed_out}", f"preemption ({rules.mode}): {_unharmed(rules.mode)}"]
    preempted = _verdict(
        save_time_s, window_s, f"a preempted run {lost}; save more often (checkpoint.save_every)"
    )
    return [
        f"{limit}; {timed_out}",
        f"preemption ({rules.mode}): {_until_the_end(rules)}; {preempted}",
        *_requeue_lines(rules),
    ]


def signal_lead_s(asked: int | None, save_time_s: float | None, time_limit_s: int | None) -> int:
    """Return the N of --signal=USR2@N, given or chosen. `save_time_s` None: the model is unknown so far.

    Raise UsageError if the given value is no time before the limit.
    """
    if asked is None:
        return choose_signal_lead_s(save_time_s or _UNKNOWN_SAVE_S, time_limit_s)
    if not 0 < asked < (time_limit_s or _MOST_LEAD_S + 1):
        raise UsageError(f"resources.signal_lead_s is {asked}: it must lie between 1 and the time limit")
    return asked


def choose_signal_lead_s(save_time_s: float, time_limit_s: int | None) -> int:
    """Choose the N of --signal=USR2@N: a step and two saves, at least 60 s, at most a quarter of the limit.

    Slurm may send it up to 60 s earlier (sbatch(1), --signal). The quarter wins: a short job (a test of a few
    minutes) must spend most of its time working, and its saves are small.
    """
    wanted = max(_LEAST_LEAD_S, math.ceil(_STEP_ALLOWANCE_S + _MARGIN * save_time_s))
    most = _MOST_LEAD_S if time_limit_s is None else min(_MOST_LEAD_S, time_limit_s // 4)
    return max(1, min(wanted, most))


def judge_server(rules: PreemptionRules, signal_lead_s: int) -> list[str]:
    """Return the user's notes at submit time about the end of a server, one sentence per line."""
    if rules.warning_window_s is None:
        preempted = _unharmed(rules.mode).replace("; nothing to save", "")
    else:
        preempted = f"{_until_the_end(rules)}; then it comes back, perhaps on another node, with the same key"
    return [
        f"time limit: the server ends {signal_lead_s} s before it, for good",
        f"preemption ({rules.mode}): {preempted}",
    ]


def _unharmed(mode: str) -> str:
    if "SUSPEND" in mode or "GANG" in mode:
        return "the run is suspended and continues later; nothing to save"
    return "nobody preempts this run"


def _until_the_end(rules: PreemptionRules) -> str:
    if rules.grace_s > 0:
        return f"{rules.source}: {rules.grace_s} s, then {rules.kill_wait_s} s (KillWait) until SIGKILL"
    return f"{rules.source}, {rules.kill_wait_s} s from SIGTERM to SIGKILL"


def _verdict(save_time_s: float, window_s: int, loss: str) -> str:
    expected = f"a save is expected to take {format_duration(save_time_s)}"
    if save_time_s * _MARGIN <= window_s:
        return f"{expected}: OK"
    if save_time_s <= window_s:
        return f"{expected}: TIGHT, the step that is running must end first"
    return f"{expected}: NOT ENOUGH; {loss}"


def _requeue_lines(rules: PreemptionRules) -> list[str]:
    if "REQUEUE" not in rules.mode:
        return ["requeue: not by Slurm (PreemptMode=CANCEL): the job asks for it itself before it is killed"]
    if rules.grace_s <= 0:
        return []
    most = rules.max_batch_requeue
    lines = [
        f"requeue: by Slurm. A job that leaves by itself inside GraceTime is held after {max(1, most)} times "
        "(MaxBatchRequeue); this one requests its requeue itself, which does not count"
    ]
    if most <= 1:
        lines.append("a run that was preempted and then finishes leaves its job held: scancel it")
    return lines
