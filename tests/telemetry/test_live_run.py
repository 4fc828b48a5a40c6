"""Real runs with real trackers: TensorBoard's own reader, W&B's own files; preemptions and kills."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc import export_metrics
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import read_steps
from tests.commands.test_export_metrics import read_events
from tests.runs import (
    Submitted,
    assert_same_run,
    held,
    kill_rank,
    submit,
    wait_committed,
    wait_over,
    wait_step,
    wait_until,
)
from tests.telemetry.test_prometheus import parse
from tests.telemetry.wandb_file import read_offline, run_ids

pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'r1hpc[trackers]'")
pytest.importorskip("wandb", reason="W&B is not installed: pip install 'r1hpc[trackers]'")

# One worker: the quiet run is made once, and each run starts processes of W&B's.
pytestmark = pytest.mark.xdist_group("trackers")

_KEY = "0123456789abcdef0123456789abcdef01234567"
_STEPS = 24
_WORDS = (f"train.num_steps={_STEPS}", "checkpoint.save_every=4", "train.global_batch_size=4")
_TRACKED = ("monitor.trackers=[wandb,tensorboard,prometheus]",)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same run without trackers, which nobody disturbed."""
    run = submit(tmp_path_factory.mktemp("quiet"), "quiet", *_WORDS).run
    wait_over(run)
    return run


def tracked(root: Path, faults: str) -> Submitted:
    """A run slow enough to be met at work, with a key in its environment."""
    slow = {**os.environ, "R1HPC_FAILPOINT": faults, "WANDB_API_KEY": _KEY}
    return submit(root, "tracked", *_WORDS, *_TRACKED, env=slow)


def test_one_curve_through_two_preemptions_and_a_killed_wandb(tmp_path: Path, quiet: RunDir) -> None:
    job = tracked(tmp_path, f"{held(tmp_path / 'never', 7)},step.begin:sleep=2::*:2")
    run = job.run
    wait_step(run, 6)
    wait_committed(run, 4)
    kill_rank(run, 0, signal.SIGKILL)  # without a warning
    wait_step(run, 10, attempt=2)
    (core,) = wait_processes(run, "wandb-core")
    os.kill(core, signal.SIGKILL)
    os.kill(int(job.job_id.removeprefix("local-")), signal.SIGUSR2)  # with one
    attempts = wait_over(run)
    wait_until("end of the trackers", lambda: not processes(run, "track"), 120, run)

    assert [a.cause for a in attempts] == [Cause.crash, Cause.preempted, Cause.finished]
    assert {step.global_step for step in read_steps(run).lost} == {5, 6}
    assert_same_run(run, quiet)
    expected = {step.global_step: step.loss for step in read_steps(run).effective.values()}
    assert list(expected) == list(range(1, _STEPS + 1))
    assert {n: values["train/loss"] for n, values in read_offline(run.trackers / "wandb").items()} == expected
    shown = read_events(run.trackers / "tensorboard")["train/loss"]
    assert [step for step, _ in shown] == list(expected)
    assert [value for _, value in shown] == pytest.approx(list(expected.values()), rel=1e-6)
    assert parse((run.metrics / "r1hpc.prom").read_text())["r1hpc_global_step", 'run="tracked"'] == _STEPS
    assert not [path for path in files(run) if _KEY.encode() in path.read_bytes()]
    assert not [
        path for path in files(run) if stat.S_IMODE(path.stat().st_mode) & 0o077 and _is_ours(run, path)
    ]


@pytest.mark.soak  # the keeper gives a hung feeder more than a minute; a killed one is above
def test_a_hung_wandb_is_not_noticed_and_its_curve_can_be_made_again(
    tmp_path: Path, quiet: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tracked(tmp_path, "step.begin:sleep=0.5::*")
    run = job.run
    wait_step(run, 6)
    stopped = [*wait_processes(run, "wandb-core"), *wait_processes(run, "--tracker wandb")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    (attempt,) = wait_over(run)
    assert attempt.cause is Cause.finished
    assert_same_run(run, quiet)
    wait_until("end of the trackers", lambda: not processes(run, "track"), 120, run)
    wait_until("end of W&B", lambda: not any(Path(f"/proc/{pid}").exists() for pid in stopped), 10)
    assert len(read_events(run.trackers / "tensorboard")["train/loss"]) == _STEPS
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert export_metrics.main([str(run.path), "--to", "wandb"]) == 0
    assert list(read_offline(run.report / "wandb")) == list(range(1, _STEPS + 1))
    assert run_ids(run.report / "wandb") == run_ids(run.trackers / "wandb"), "the same run to W&B"


def files(run: RunDir) -> Iterator[Path]:
    return (path for path in run.path.rglob("*") if path.is_file() and not path.is_symlink())


def _is_ours(run: RunDir, path: Path) -> bool:
    return run.trackers in path.parents


def processes(run: RunDir, *words: str) -> list[int]:
    """Live `track` processes of the run and what they started, with these words in their command line."""
    table = {}
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat_file.read_text().rpartition(")")[2].split()[:2]
            command = (stat_file.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
        if state != "Z":
            table[int(stat_file.parent.name)] = (int(parent), command)

    def is_of_the_run(pid: int) -> bool:
        if pid not in table:
            return False
        parent, command = table[pid]
        return (" track " in command and str(run.path) in command) or is_of_the_run(parent)

    return [pid for pid in table if is_of_the_run(pid) and all(word in table[pid][1] for word in words)]


def wait_processes(run: RunDir, *words: str) -> list[int]:
    wait_until(f"a process {' '.join(words)}", lambda: bool(processes(run, *words)), 120, run)
    return processes(run, *words)
