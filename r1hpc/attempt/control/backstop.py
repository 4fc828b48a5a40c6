"""End a parent process that gives no sign for so many seconds and cannot run Python either.

    python backstop.py SECONDS      # its stdin is a pipe: each byte is a sign, the end of it is the end

A process of its own, since a thread cannot act while another one holds the interpreter lock in C. The parent
gets SIGABRT, on which faulthandler writes its stacks. Time in which either is suspended does not count.
Imports nothing but the standard library: it is started without the packages.
"""

import os
import resource
import select
import signal
import sys

_PERIOD_S = 1.0


def watch(patience_s: float) -> None:
    """Until the pipe is closed, or the parent was ended."""
    parent, silent_s = os.getppid(), 0.0
    while True:
        # A select that was suspended counts once, however long it took.
        if select.select([0], [], [], _PERIOD_S)[0]:
            if not os.read(0, 4096):
                return
            silent_s = 0.0
        elif not _is_stopped(parent):
            silent_s += _PERIOD_S
        if os.getppid() != parent:  # it is gone, and something that it forked holds the pipe
            return
        if silent_s > patience_s:
            # The stacks are what is wanted, not the memory of the whole process on a shared file system.
            resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))
            os.kill(parent, signal.SIGABRT)
            return


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # pathlib takes longer to import than all else
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


if __name__ == "__main__":
    # Signals for the whole job (a preemption) are the parent's to answer.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    watch(float(sys.argv[1]))
