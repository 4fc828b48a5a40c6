"""Serve requests inside a helper process: frames (process.py) on stdin, a reply to each on stdout.

First it sends {"ready": something} or {"error": why}. It ends when stdin closes, on Linux also when its
parent dies. The parent handles signals to the processes of a job step; this process runs until it is killed.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from r1hpc.base.errors import UsageError
from r1hpc.tasks.sandbox.process import pack, read_frame

Handler = Callable[[Any], Any]

_PR_SET_PDEATHSIG = 1
_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def serve(parent: int, ready: Callable[[], tuple[Handler, Any]]) -> int:
    """Answer the parent's requests. `ready` returns their handler, and the first message to the parent."""
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    requests, replies = _own_stdin(), _own_stdout()
    try:
        handler, hello = ready()
    except (ImportError, UsageError) as error:
        _send(replies, {"error": f"{error}"})
        return 1
    _silence_stderr()
    _send(replies, {"ready": hello})
    while (request := read_frame(requests)) is not None:
        _send(replies, handler(request))
    return 0


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies: a hanging judge does not see the end of stdin."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        raise SystemExit(0)


def _own_stdin() -> BinaryIO:
    """Take the parent's pipe away from code that reads: `input()` finds the end of a file."""
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return requests


def _own_stdout() -> BinaryIO:
    """Take the pipe to the parent away from packages that print."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return replies


def _silence_stderr() -> None:
    """Discard stderr: parsers complain there about hostile text, and would fill the trainer's log."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _send(stream: BinaryIO, value: Any) -> None:
    stream.write(pack(value))
    stream.flush()
