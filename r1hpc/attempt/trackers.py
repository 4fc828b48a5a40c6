"""Feed an attempt's trackers (W&B, TensorBoard, Prometheus) from a separate process on the batch host.

`begin` starts the process, and it lives up to a minute longer than the attempt. The ranks do not wait for it;
only the `end` of a run does, up to 20 s. telemetry/trackers/ does the sending. Steps missed because of a
quick requeue are sent in the next attempt. `check_trackers` checks before submission whether they can work.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from r1hpc.attempt.detached import start_detached
from r1hpc.attempt.state.state import ask, is_of_run, job_named
from r1hpc.attempt.workload import require
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import GrowingFile, parse_object, write_atomic
from r1hpc.base.lock import hold
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import read
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import counts_of, is_server
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.trackers.keeper import keep_feeders, step_back

_PID = "trackers.pid"
_AWAIT_S = 20.0
"""Nodes wait meanwhile. `export-metrics` sends what is left."""
_EARLIER_S = 70.0
"""How long to wait for the previous attempt's trackers to leave."""
_ASK_EVERY_S = 120.0
"""Seconds between checks whether the job still lives; its end is usually recorded."""


def check_trackers(config: RunConfig, executor: str) -> list[str]:
    """Look for the packages in the interpreter that will feed the trackers, and for W&B's key, which a Slurm
    job does not get from the environment. Return a note if the run has nothing for them.

    Raise UsageError if something is missing, or W&B's URL holds a password; it says what to do.
    """
    if not _may_record_steps(config):
        return [f"monitor.trackers has no use in stage {config.stage}, which records no steps"]
    asked = dict.fromkeys(config.monitor.trackers)
    needed = [name for name in asked if name != "prometheus"]  # its file needs no package
    require("monitor.trackers", needed, "trackers", config, executor)
    if "wandb" in asked and "@" in os.environ.get("WANDB_BASE_URL", ""):
        raise UsageError(
            "WANDB_BASE_URL holds a user or a password, and the run would record it: take it out of the URL, "
            "and log in with `wandb login --host URL`, which leaves the key in ~/.netrc"
        )
    if "wandb" in asked and config.monitor.wandb.mode == "online" and not _has_key(config, executor):
        raise UsageError(
            "monitor.wandb.mode=online finds no key: run `wandb login` here, which leaves it in ~/.netrc for "
            "the job (WANDB_API_KEY is not passed to jobs); or take monitor.wandb.mode=offline"
        )
    return []


def _may_record_steps(config: RunConfig) -> bool:
    return counts_of(config.stage) != "parts" and not is_server(config.stage)


def start_trackers(run: RunDir, config: RunConfig, attempt: int) -> None:
    """Start the process that feeds the trackers. Training goes on if it cannot be started."""
    if not config.monitor.trackers or not _may_record_steps(config):
        return
    try:
        run.trackers.mkdir(mode=0o700, exist_ok=True)
        words = ["track", str(run.path), "--attempt", str(attempt)]
        process = start_detached(words, run, run.trackers / "trackers.out")
        write_atomic(run.trackers / _PID, str(process.pid))
    except OSError as error:
        print(f"no trackers in attempt {attempt}: {error}", file=sys.stderr)


def track(run: RunDir, attempt: int) -> None:
    """Keep the trackers fed until the attempt is over."""
    step_back()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a warning to the job is for the ranks
    config = read(run.config)
    run.trackers.mkdir(mode=0o700, exist_ok=True)
    lock = hold(run.trackers / "trackers.lock", f"trackers of attempt {attempt}", _EARLIER_S)
    try:
        word = [sys.executable, "-u", "-m", "r1hpc.launch", "track", str(run.path), "--attempt", str(attempt)]
        commands = {name: [*word, "--tracker", name] for name in dict.fromkeys(config.monitor.trackers)}
        keep_feeders(commands, _AttemptIsOver(run, attempt))
    finally:
        if lock is not None:
            os.close(lock)


def await_trackers(run: RunDir) -> None:
    """Wait a while until the trackers have the last steps."""
    pid, deadline = run.trackers / _PID, time.monotonic() + _AWAIT_S
    if not pid.is_file():
        return
    process = int(pid.read_text())
    while is_of_run(process, run.path) and time.monotonic() < deadline:
        time.sleep(0.1)


def _has_key(config: RunConfig, executor: str) -> bool:
    if any("WANDB_API_KEY" in line for line in config.cluster.setup):  # a line that reads it from a file
        return True
    if executor == "local" and os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return host in Path(os.environ.get("NETRC") or "~/.netrc").expanduser().read_text()
    except (OSError, ValueError, RuntimeError):
        return False


class _AttemptIsOver:
    def __init__(self, run: RunDir, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        self._events = GrowingFile(run.attempts)
        self._ask_at = time.monotonic() + _ASK_EVERY_S

    def __call__(self) -> bool:
        try:
            events = filter(None, map(parse_object, self._events.lines()))
            if any(map(self._ends, events)):
                return True
            if time.monotonic() < self._ask_at:
                return False
            self._ask_at = time.monotonic() + _ASK_EVERY_S
            last = read_history(self._run).last
            job = job_named(self._run, last.job_id) if last is not None else None
            return job is not None and ask(self._run, job, timeout_s=10.0).alive is False
        except (R1hpcError, OSError):  # a file system error stops no tracker: ask again in a moment
            return False

    def _ends(self, event: dict[str, Any]) -> bool:
        what, attempt = event.get("event"), event.get("attempt")
        if not isinstance(attempt, int):
            return False
        return (what == "end" and attempt >= self._attempt) or (what == "begin" and attempt > self._attempt)
