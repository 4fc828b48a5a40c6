"""Start a process and exchange JSON with it over two pipes, with a deadline for every reply.

The verifier, reasoning-gym and custom tasks run in such processes. `WorkerProcess` is the parent's side, and
trusts the other side neither to read, to answer nor to end. A message (frame) is four bytes of length, then
JSON. A request is [number, content], as is its reply. `serve` is the process's side: it first sends
{"ready": something} or {"error": why}, and ends when stdin closes, on Linux also when its parent dies.
Signals to the job step are left to the parent.
"""

import ctypes
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from r1hpc.base.errors import R1hpcError, UsageError

HEADER = struct.Struct(">I")
_ROOT = Path(__file__).resolve().parents[3]
_READ_SIZE = 1 << 16
_LONGEST_REPLY = 1 << 28
_OWN_START_LIMIT_S = 60.0
"""To import custom code: torch alone takes half a minute from a network file system under load."""
_NOT_FOR_THE_WORKER = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1

Handler = Callable[[Any], Any]


def pack(value: Any) -> bytes:
    """Return a frame. Escaped to ASCII, so that it can carry lone surrogates."""
    body = json.dumps(value).encode("ascii")
    return HEADER.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Any:
    """Return the next value; None if the other side has closed."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    body = stream.read(HEADER.unpack(header)[0])
    return json.loads(body)


class TimedOutError(R1hpcError):
    """No answer before the deadline."""


class DiedError(R1hpcError):
    """The process ended without an answer."""


class WorkerProcess:
    """A worker killed by `stop`, at the latest when this object is collected."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-P", "-m", module, str(os.getpid()), *arguments]
        self._module = module
        # Block signals: a child inherits the mask, so that signals to the job step cannot end it early.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_WORKER)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), bufsize=0
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._received = bytearray()
        self._asked = 0
        self._finalizer = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, limit_s: float) -> Any:
        """Return its message once it has loaded what it needs. Raise UsageError with its reason if it cannot,
        R1hpcError if it died, or takes over `limit_s` seconds."""
        try:
            hello = self._read_frame(time.monotonic() + limit_s)
        except (DiedError, TimedOutError) as error:
            raise R1hpcError(
                f"{self._module} did not start ({error}); what it printed is on stderr"
            ) from None
        if "error" in hello:
            raise UsageError(hello["error"])
        return hello["ready"]

    def ask(self, request: Any, deadline_s: float) -> Any:
        """Return its reply. Raise TimedOutError if none came within `deadline_s` seconds, and the process
        must be stopped; DiedError if it ended instead."""
        deadline = time.monotonic() + deadline_s
        self._asked += 1
        self._write(pack([self._asked, request]), deadline)
        match self._read_frame(deadline):
            case [self._asked, reply]:
                return reply
        raise DiedError("custom code wrote to its pipe")  # the next reply would be read as another's

    def stop(self) -> None:
        """Kill it and wait until it is gone. A second call does nothing."""
        self._finalizer()

    def _write(self, raw: bytes, deadline: float) -> None:
        left = memoryview(raw)
        while left:
            self._wait(self._to, select.POLLOUT, deadline)
            try:
                left = left[os.write(self._to, left) :]
            except BrokenPipeError:
                raise DiedError("it closed its end") from None

    def _read_frame(self, deadline: float) -> Any:
        (length,) = HEADER.unpack(self._read_exactly(HEADER.size, deadline))
        if length > _LONGEST_REPLY:
            raise DiedError(f"it sent {length} bytes")
        try:
            return json.loads(self._read_exactly(length, deadline))
        except ValueError:
            raise DiedError("it sent something that is not JSON") from None

    def _read_exactly(self, count: int, deadline: float) -> bytes:
        while len(self._received) < count:
            self._wait(self._from, select.POLLIN, deadline)
            piece = os.read(self._from, _READ_SIZE)
            if not piece:
                raise DiedError("it closed its end")
            self._received += piece
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(fd, event)
        # We may have been suspended, and look late at an answer that came in time.
        left = max(0.0, deadline - time.monotonic())
        if not poller.poll(left * 1000):
            raise TimedOutError("no answer in time")


def wait_for_own(worker: WorkerProcess, spec: str) -> Any:
    """Return the message of a worker with custom code, once it has loaded it. Raise UsageError with one
    sentence about what the code did instead."""
    try:
        return worker.wait_ready(_OWN_START_LIMIT_S)
    except UsageError:
        raise
    except R1hpcError as error:
        hangs = isinstance(error.__context__, TimedOutError)
        how = f"takes over {_OWN_START_LIMIT_S:g} s" if hangs else "ends the process (os._exit?)"
        raise UsageError(f"{spec}: importing it {how}; an import must only define things") from None


def _environment() -> dict[str, str]:
    """Return our environment, with the package importable from any folder, one thread, a fixed hash seed."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(_ROOT), *(path for path in inherited if Path(path).is_absolute())]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes the pipes and waits
        process.kill()


def serve(parent: int, ready: Callable[[], tuple[Handler, Any]]) -> int:
    """Answer the parent's requests. `ready` returns their handler, and the first message to the parent."""
    for number in _NOT_FOR_THE_WORKER:
        signal.signal(number, signal.SIG_IGN)
    # SIGKILL from the kernel when the parent dies: a hanging judge does not see the end of stdin.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        raise SystemExit(0)
    # The pipes are taken away from code that prints or reads: `input()` finds the end of a file.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        handler, hello = ready()
    except (ImportError, UsageError) as error:
        _send(replies, {"error": f"{error}"})
        return 1
    # Parsers complain on stderr about hostile text, and would fill the trainer's log.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _send(replies, {"ready": hello})
    while (request := read_frame(requests)) is not None:
        number, content = request
        _send(replies, [number, handler(content)])
    return 0


def _send(stream: BinaryIO, value: Any) -> None:
    stream.write(pack(value))
    stream.flush()
