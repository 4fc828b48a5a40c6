"""Inject faults for tests and benchmarks: R1HPC_FAILPOINT=name:action[:rank][:nth][:attempt][,...].

The code calls `failpoint(name)` where a fault can be injected; without the variable nothing happens.
Actions: term, kill9, exit, raise, enospc, eio, stop, sleep=SECONDS, until=FILE (wait until it exists; no
colon or comma in its path). `rank` may be * or empty for any; `nth` counts calls from 1 (default 1), * is
every call; `attempt` limits it to one attempt.
"""

import errno
import os
import signal
import time
from pathlib import Path

_UNTIL_S = 120.0
"""Seconds before it stops waiting for the file."""
_SIGNALS = {"kill9": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_calls: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Do the action of R1HPC_FAILPOINT for this place, if any."""
    wanted = os.environ.get("R1HPC_FAILPOINT")
    if not wanted:
        return
    _calls[name] = _calls.get(name, 0) + 1
    for item in wanted.split(","):
        point, action, rank, nth, attempt = (item.split(":") + ["", "", ""])[:5]
        if point != name or rank not in ("", "*", os.environ.get("RANK", "0")):
            continue
        if attempt not in ("", os.environ.get("R1HPC_ATTEMPT")):
            continue
        if nth == "*" or _calls[name] == int(nth or 1):
            _act(name, action)


def _act(name: str, action: str) -> None:
    if action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    elif action.startswith("until="):
        _wait_for(action.removeprefix("until="), name)
    elif action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action == "exit":
        os._exit(3)
    elif action in ("enospc", "eio"):
        code = errno.ENOSPC if action == "enospc" else errno.EIO
        raise OSError(code, os.strerror(code), f"failpoint {name}")
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    else:
        raise ValueError(f"R1HPC_FAILPOINT: unknown action {action!r}")


def _wait_for(path: str, name: str) -> None:
    deadline = time.monotonic() + _UNTIL_S
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"failpoint {name}: no {path} in {_UNTIL_S:.0f} s")
        time.sleep(0.05)
