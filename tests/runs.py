"""Whole runs in tests: submitted through the command a user takes, watched through their run folders.

run = submit(tmp_path, "a", "train.num_steps=20", "--nodes", "2")
wait_step(run, 5); ...; wait_over(run)
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from r1hpc.attempt.state.state import read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.telemetry.records.attempts import Attempt, read_history
from r1hpc.telemetry.records.metrics import audit_ledger, compare, last_steps, read_ledger

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Submitted:
    """A run as its submission printed it."""

    run: RunDir
    job_id: str


def submit(
    root: Path,
    name: str,
    *words: str,
    job: str = "jobs/smoke.yaml",
    env: Mapping[str, str] | None = None,
) -> Submitted:
    """`python -m r1hpc.submit JOB WORDS`, on this machine unless WORDS name an executor."""
    cut = words.index("--") if "--" in words else len(words)
    ours, of_script = words[:cut], words[cut:]
    command = ["-m", "r1hpc.submit", *([job] if "--resume" not in words else []), *ours]
    where = ["--run-root", str(root), "--run-name", name, "--json"]
    if "--executor" not in words:
        where += ["--executor", "local"]
    answer = json.loads(command_output([*command, *where, *of_script], env))
    return Submitted(RunDir(answer["run_dir"]), str(answer["job_id"]))


def command_output(argv: list[str], env: Mapping[str, str] | None = None) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=CHECKOUT,
        env=run_environment(env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(argv)} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user without a GPU; one thread per rank, which two cores need."""
    base = dict(os.environ) if env is None else dict(env)
    return {"DS_ACCELERATOR": "cpu", **base, "OMP_NUM_THREADS": "1"}


def wait_until(what: str, done: Callable[[], bool], timeout_s: float, run: RunDir | None = None) -> None:
    """Poll; when time is up, fail with the tail of the run's logs."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s\n{tail(run) if run else ''}"
        time.sleep(0.1)


def held(file: Path, step: int, *, rank: int | str = "*", attempt: int = 1) -> str:
    """A failpoint: before the `step`th step of an attempt, `rank` waits until `file` is there.

    So that what is done to a run meets it in that step, however late it is done.
    """
    return f"step.begin:until={file}:{rank}:{step}:{attempt}"


def at(*failpoints: str) -> dict[str, str]:
    """Environment with these failpoints."""
    return {**os.environ, "R1HPC_FAILPOINT": ",".join(failpoints)}


def until_stopped(run: Path, step: int) -> dict[str, str]:
    """Environment of a run that waits for its STOP file before this step of its first attempt, and stops."""
    look = f"step.begin:sleep=1.1:*:{step}:1"  # it looks once a second
    return at(held(RunDir(run).stop, step), look)


def wait_step(run: RunDir, step: int, timeout_s: float = 300, attempt: int = 1) -> None:
    """Until optimizer step `step` is on record, of this attempt or a later one."""

    def is_there() -> bool:
        newest = last_steps(run, 1)
        return bool(newest) and newest[-1].global_step >= step and newest[-1].attempt >= attempt

    wait_until(f"step {step}", is_there, timeout_s, run)


def wait_committed(run: RunDir, step: int, timeout_s: float = 180) -> None:
    """Until the checkpoint of step `step` is there."""
    store = CheckpointStore(run.checkpoints)
    wait_until(f"commit of step {step}", lambda: any(c.step == step for c in store.list()), timeout_s, run)


def current_step(run: RunDir) -> int:
    """The newest step on record, 0 before the first."""
    newest = last_steps(run, 1)
    return newest[-1].global_step if newest else 0


def wait_over(run: RunDir, timeout_s: float = 300) -> list[Attempt]:
    """Until the run is over and its last attempt's end is on record; its attempts."""

    def over() -> bool:
        situation = read_situation(run)
        last = situation.history.last
        return situation.state.is_over and (last is None or last.cause is not None)

    wait_until("end of the run", over, timeout_s, run)
    return list(read_situation(run).history.attempts)


def wait_attempt(run: RunDir, attempt: int, timeout_s: float = 300) -> None:
    """Until attempt `attempt` has begun."""
    wait_until(f"attempt {attempt}", lambda: len(read_history(run).attempts) >= attempt, timeout_s, run)


def rank_pids(run: RunDir, attempt: int | None = None) -> dict[int, int]:
    """rank -> pid of the live rank processes of a local run, of any attempt unless one is named."""
    found = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if attempt is not None and f"R1HPC_ATTEMPT={attempt}".encode() not in environment:
            continue
        if b"rank" in command and str(run.path).encode() in command:
            rank = next((v[17:] for v in environment if v.startswith(b"R1HPC_LOCAL_RANK=")), None)
            if rank is not None:
                found[int(rank)] = int(process.name)
    return found


def kill_rank(run: RunDir, rank: int, number: signal.Signals) -> None:
    """Send a signal to one rank of a local run."""
    os.kill(rank_pids(run)[rank], number)


def ends_of(run: RunDir) -> list[Path]:
    """/proc of each `launch end` of the run."""
    words = f"r1hpc.launch\0end\0{run.path}\0"
    return [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if words in read_text(path)]


def is_halted(run: RunDir) -> bool:
    return any("State:\tT" in read_text(process / "status") for process in ends_of(run))


def go_on(run: RunDir) -> None:
    """Wake the `launch end` that has halted, where scancel has not: it sends SIGCONT first."""
    for process in ends_of(run):
        with suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGCONT)


def read_text(path: Path) -> str:
    """Of a process that may have ended meanwhile."""
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def assert_same_run(disturbed: RunDir, undisturbed: RunDir) -> None:
    """Every step's loss, gradient norm and learning rate equal to the last bit, every sample once."""
    assert compare(undisturbed, disturbed) == []
    assert_same_data(disturbed, undisturbed)


def assert_same_data(disturbed: RunDir, undisturbed: RunDir) -> None:
    """Each step consumed the same global batch, and every sample was consumed exactly once."""
    ours = {step: record.data for step, record in read_ledger(disturbed).items()}
    theirs = {step: record.data for step, record in read_ledger(undisturbed).items()}
    assert ours == theirs
    assert audit_ledger(disturbed).exactly_once


def tail(run: RunDir, lines: int = 25) -> str:
    """The end of every log of the newest attempt, for a failure's message."""
    logs = [*run.logs.glob("*.out"), *sorted((run.logs / "latest").glob("rank_*.out"))]
    attempts = run.attempts.read_text() if run.attempts.exists() else ""
    parts = [f"--- {path}\n" + "\n".join(path.read_text().splitlines()[-lines:]) for path in logs]
    return "\n".join([attempts, *parts])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path inside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
