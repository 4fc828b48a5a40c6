"""Abort a parent process that sends no sign of life for SECONDS. `watchdog.py` starts it beside each rank.

    python backstop.py SECONDS      # stdin is a pipe: each byte is a sign; end of file ends this process

This is a separate process because no thread of the parent can act while another holds the interpreter lock in
C. The parent gets SIGABRT, and faulthandler writes its stacks. Time in which either process is suspended does
not count. It imports only the standard library: it runs as long as the rank, and starts at once.
"""

import os
import resource
import select
import signal
import sys

_PERIOD_S = 1.0


def watch(patience_s: float) -> None:
    """Watch until the pipe is closed or the parent was ended."""
    parent, silent_s = os.getppid(), 0.0
    while True:
        # A select that was suspended counts once, however long it took.
        if select.select([0], [], [], _PERIOD_S)[0]:
            if not os.read(0, 4096):
                return
            silent_s = 0.0
        elif not _is_stopped(parent):
            silent_s += _PERIOD_S
        if os.getppid() != parent:  # it has exited, and a process it forked holds the pipe
            return
        if silent_s > patience_s:
            # Only the stacks are needed, not a core dump on a shared file system.
            resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0))
            os.kill(parent, signal.SIGABRT)
            return


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # importing pathlib takes longer than all the rest
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


if __name__ == "__main__":
    # The parent answers signals for the job (a preemption).
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    watch(float(sys.argv[1]))
