"""Processes of a run on this machine: its local supervisor, and ranks that outlive one which was killed.

is_of_run(pid, run.path)                 # a process id may be another process's by now
ranks_of(run.path, "local-4711")         # -> pids
"""

import os
import time
from pathlib import Path

_LOOKS, _PAUSE_S = 100, 0.02


def is_of_run(pid: int, run_dir: Path) -> bool:
    """Whether `pid` is a process of this user that was started with this run folder as an argument."""
    process = Path(f"/proc/{pid}")
    try:
        if process.stat().st_uid != os.getuid():
            return False
        folder = (process / "cwd").readlink()
        arguments = _arguments(process)
    except OSError:
        return False
    paths = (Path(os.fsdecode(argument)) for argument in arguments)
    return any((folder / p).resolve() == run_dir.resolve() for p in paths if p.name == run_dir.name)


def ranks_of(run_dir: Path, job_id: str) -> list[int]:
    """The live ranks that the local supervisor of this job id has started."""
    mark = f"R1HPC_LOCAL_JOB_ID={job_id}".encode()
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()]
    # is_of_run first, which waits until a process has been started: before that it has no environment either.
    return [pid for pid in pids if is_of_run(pid, run_dir) and mark in _environment(pid)]


def _arguments(process: Path) -> list[bytes]:
    """Of a process that is being started Linux shows none for a moment (longer where no core is free).

    Raises:
        OSError: it has none: a zombie, or a thread of the kernel's own.
    """
    for _ in range(_LOOKS):
        found = (process / "cmdline").read_bytes()
        if found:
            return found.split(b"\0")
        (process / "exe").readlink()
        time.sleep(_PAUSE_S)
    return []


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
