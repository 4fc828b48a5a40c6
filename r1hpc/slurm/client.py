"""Run Slurm's commands: with a time limit, never through a shell, and with clear errors.

Times are Unix seconds: SLURM_TIME_FORMAT=%s, which squeue, sinfo, scontrol and sacct obey (their man pages,
"ENVIRONMENT VARIABLES"). The caller's format or locale cannot change what is parsed.

SlurmError distinguishes a silent controller from a refusal; `retry` repeats a call until it succeeds, fails
for good or time is up.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import IO, TypeVar

from r1hpc.base.errors import R1hpcError

NO_CONFIGURATION = "Could not establish a configuration source"
"""Slurm's commands are installed, but this machine belongs to no cluster."""
# slurm_errno.c: a client's message when the daemon is down, restarting or switching to its backup.
_NOT_ARRIVED = (
    "Unable to contact slurm controller",
    "Unable to contact Slurm controller",
    "Connection refused",
    "Communication connection failure",
    "Slurm backup controller in standby mode",
)
_BACK_OFF_S = (1.0, 2.0, 4.0, 8.0, 15.0)
_LONGEST_PAUSE_S = 30.0
_MAYBE_ARRIVED = (
    "Socket timed out",
    "Connection timed out",
    "Zero Bytes were transmitted",
    "Transport endpoint is not connected",
    "Connection reset by peer",
    "Message receive failure",
    "Message send failure",
    "Header lengths are longer than data received",
    "Unexpected message received",
)
_Result = TypeVar("_Result")


class SlurmError(R1hpcError):
    """A Slurm command failed. Holds its output, for callers that can handle it."""

    def __init__(
        self,
        message: str,
        exit_code: int | None = None,
        stdout: str = "",
        stderr: str = "",
        timed_out: bool = False,
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """None: the command is missing, or was killed because it took too long."""
        self.stdout = stdout
        self.stderr = stderr
        self.timed_out = timed_out

    @property
    def unreachable(self) -> bool:
        """True if slurmctld (or slurmdbd) did not answer, so that the same call may work later."""
        said = f"{self.stdout}\n{self.stderr}"
        return self.timed_out or any(words in said for words in (*_NOT_ARRIVED, *_MAYBE_ARRIVED))

    @property
    def may_have_arrived(self) -> bool:
        """True if slurmctld may have carried out the request, and only its answer was lost.

        A signal that ended the command (negative exit code) may have come after the request.
        """
        return (
            self.timed_out
            or (self.exit_code or 0) < 0
            or any(words in self.stderr for words in _MAYBE_ARRIVED)
        )


def call(argv: Sequence[str], timeout_s: float = 30.0, env: Mapping[str, str] | None = None) -> str:
    """Run one Slurm command and return its stdout.

    `env` is the command's full environment; None takes this process's, with times as Unix seconds. Raise
    SlurmError if there is no such command, it takes too long, or exits with a status other than 0.
    """
    return run(argv, timeout_s, env).stdout


def retry(
    action: Callable[[], _Result], is_final: Callable[[SlurmError], bool], patience_s: float
) -> _Result:
    """Run `action` until it succeeds, fails for good or time is up; return its result, or raise its error."""
    deadline = time.monotonic() + patience_s
    for pause in chain(_BACK_OFF_S, repeat(_LONGEST_PAUSE_S)):
        try:
            return action()
        except SlurmError as error:
            if is_final(error) or time.monotonic() + pause > deadline:
                raise
            print(f"{' '.join(str(error).split())}: trying again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError("the pauses never end")


def without_advice(error: SlurmError) -> str:
    """Describe the error in one line, for a caller with its own advice."""
    return str(error).splitlines()[0].split(": run this")[0]


def run(
    argv: Sequence[str],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    stdout: "int | IO[bytes]" = subprocess.PIPE,
    text: str = "",
) -> "subprocess.CompletedProcess[str]":
    """Run one Slurm command like `call`, with `text` on stdin. `stdout` may be an open file, for an answer
    that is too long to hold in memory."""
    shown = shlex.join(argv)
    # Slurm's output in the form that is parsed here.
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"} if env is None else dict(env)
    try:
        done = subprocess.run(
            argv,
            input=text,
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            env=environment,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{argv[0]} is not on PATH: run this on a login node of the cluster, "
            "or use --executor local where there is no Slurm"
        ) from None
    except subprocess.TimeoutExpired as late:
        out, err = _text(late.stdout), _text(late.stderr)
        message = f"`{shown}` did not answer within {timeout_s:g} s{_quoted(out, err)}"
        raise SlurmError(message, None, out, err, timed_out=True) from None
    if done.returncode:
        out = done.stdout or ""  # None if it went into a file
        message = f"`{shown}` failed with exit status {done.returncode}{_quoted(out, done.stderr)}"
        if NO_CONFIGURATION in done.stderr:
            message = f"`{argv[0]}` finds no cluster from here: run this on a login node, or set SLURM_CONF"
        raise SlurmError(message, done.returncode, out, done.stderr)
    return done


def _quoted(stdout: str, stderr: str) -> str:
    said = {"stderr": stderr.strip(), "stdout": stdout.strip()}
    return "".join(f"\n  {name}: {text}" for name, text in said.items() if text)


def _text(output: bytes | str | None) -> str:
    # subprocess leaves bytes in TimeoutExpired even with text=True.
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
