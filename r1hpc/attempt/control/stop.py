"""Handle requests to save or stop: a signal, a touched file or a deadline; the loop acts between two steps.

    requests = StopRequests(run, rank)
    requests.install()           # SIGTERM and SIGUSR2 mean the same: save, then leave
    ...
    stop, save = requests.poll() # for this rank; train/loop/step.py agrees over all ranks

The signal handler only sets a flag: a collective there would deadlock against the one that the signal
interrupted (Lightning #21406). SIGUSR1 is left alone because NCCL uses it (submitit #1697).
"""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from r1hpc.base.run_dir import RunDir

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that make a rank save and leave."""
_FILE_POLL_S = 1.0
OUT_OF_HOURS = "limits.max_gpu_hours"
"""Reason of a stop because the run has used up its own allowance."""


@dataclass(frozen=True)
class Deadlines:
    """Times by time.monotonic() at which an attempt saves or stops by itself. None: never."""

    first_save_at: float | None = None
    """Half of the time limit, so that short slices make progress with any save interval."""
    stop_at: float | None = None
    """When the run's own limit of GPU-hours is used up."""
    ends_at: float | None = None
    """When the time limit ends the job."""
    warning_window_s: float | None = None
    """From the first signal of a preemption to the kill."""


def is_save_due(step: int, *, every: int, last: int | None = None, asked: bool = False) -> bool:
    """True if the state after `step` must be saved: every `every` steps (0: never), after the last one, and
    where a stop or a save was asked for."""
    return asked or step == last or (every > 0 and step % every == 0)


class StopRequests:
    """Requests to this rank: signals. Rank 0 also watches the STOP and SAVE files and the clock."""

    def __init__(self, run: RunDir, rank: int, deadlines: Deadlines = Deadlines()) -> None:
        self._stop_file, self._save_file = run.stop, run.save
        self._watch_files = rank == 0
        self.deadlines = deadlines if rank == 0 else Deadlines()
        self._saved = False
        self._answering = False
        self._reported_file: int | None = None
        """The request that `poll` returned last, as `_asked_at`."""
        self._answers_file: int | None = None
        """The request that the current save answers, as `_asked_at`."""
        self._next_file_poll = 0.0
        self._stop = False
        self._save = False
        self.reason = ""
        """The first cause of the stop: a signal's name, `STOP file` or OUT_OF_HOURS."""
        self._signalled_at: float | None = None

    def install(self) -> None:
        """Take over SIGTERM and SIGUSR2 from a launcher's handlers, and handle the signals kept until now."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # Slurm sends SIGCONT before SIGTERM; it means nothing here.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def poll(self) -> tuple[bool, bool]:
        """Return (stop, save) as this rank knows it now. `committed` consumes a SAVE file.

        A request that the current save answers is not reported again.
        """
        now = time.monotonic()
        if self.deadlines.stop_at is not None and now >= self.deadlines.stop_at:
            self._ask_to_stop(OUT_OF_HOURS)
        if self._watch_files and now >= self._next_file_poll:
            self._next_file_poll = now + _FILE_POLL_S
            with suppress(OSError):  # a file system error is not a request
                if self._stop_file.exists():
                    self._ask_to_stop("STOP file")
                self._save = self._save_file.exists()
        first_save_at = self.deadlines.first_save_at
        is_due = first_save_at is not None and not self._saved and now >= first_save_at
        save = (self._save or is_due) and not self._answering
        if save:
            self._reported_file = self._asked_at()
        return self._stop, save

    def copied(self) -> None:
        """Record that the state was copied for a checkpoint, which answers all requests until now."""
        self._answers_file, self._answering = self._asked_at() if self._save else None, True

    def committed(self) -> None:
        """Answer the SAVE request: the checkpoint of the last `copied` is committed.

        Without `copied`, it answers what `poll` reported last.
        """
        if not self._answering and self._save:
            self._answers_file = self._reported_file
        self._saved, self._answering = True, False
        if self._answers_file is not None:
            if self._asked_at() == self._answers_file:  # a later touch asks for a newer state
                self._save_file.unlink(missing_ok=True)
            self._save, self._answers_file = False, None
            self._next_file_poll = 0.0

    def _asked_at(self) -> int | None:
        """Return when the file SAVE was last touched, in Unix nanoseconds; None if it does not exist."""
        with suppress(OSError):
            return self._save_file.stat().st_mtime_ns
        return None

    def seconds_left(self) -> float | None:
        """Return the seconds until this job is killed, if known."""
        now, ends = time.monotonic(), [self.deadlines.ends_at]
        if self._signalled_at is not None and self.deadlines.warning_window_s is not None:
            ends.append(self._signalled_at + self.deadlines.warning_window_s)
        return min((end - now for end in ends if end is not None), default=None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A second signal changes nothing: the save is running, and Slurm sends SIGTERM twice.
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
        self._ask_to_stop(signal.Signals(number).name)

    def _ask_to_stop(self, reason: str) -> None:
        self._stop = True
        self.reason = self.reason or reason
