"""The R1 chain that comes with the toolkit, cut small, killed at every stage and submitted again: it ends as
the chain that nobody touched, and nothing is done twice."""

import hashlib
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.submission.chain.file import open_definition
from r1hpc.submission.chain.folder import ChainDir, supervisor_pid
from r1hpc.telemetry.records.attempts import Attempt, Cause, read_history
from tests.cluster import Cluster
from tests.runs import current_step, rank_pids, wait_until
from tests.submission.chains import actions_of, submit, submitted
from tests.submission.test_local import kill

_SMALL = (
    *("traces:generate.num_items=400", "traces:generate.items_per_part=100"),
    *("sft:train.num_steps=30", "sft:checkpoint.save_every=10"),
    *("grpo:train.num_steps=6", "grpo:checkpoint.save_every=2", "grpo:evaluate.every=3"),
    *("grpo:evaluate.num_items=16", "grpo:evaluate.num_samples=2"),
    *("reject:generate.num_items=64", "reject:generate.items_per_part=16", "reject:generate.keep=all"),
    *("sft2:train.num_steps=12", "sft2:checkpoint.save_every=4"),
    *("distil:train.num_steps=12", "distil:checkpoint.save_every=4"),
    *("evaluate.num_items=32", "generate.items_per_part=8"),
)
_SLOW = "step.begin:sleep=3::*:1,evaluate.batch:sleep=3::*:1"
"""First attempts last longer than a submission of the chain, which comes before each stage is killed."""
_LEFT = ("traces.jsonl", "evaluation.json", "transcripts.txt", "model/model.safetensors")


def words(root: Path) -> list[str]:
    return ["jobs/r1.yaml", "--executor", "local", *_SMALL]


def finish(root: Path) -> None:
    done = submit(root, *words(root), "--follow", timeout_s=900)
    assert done.returncode == 0, done.stderr


def digests(chain: ChainDir, root: Path) -> dict[str, str]:
    """What each stage left for others, by content; paths of the run root taken out."""
    paths = [run / name for run in sorted(chain.path.iterdir()) for name in _LEFT if (run / name).is_file()]
    return {
        str(path.relative_to(chain.path)): hashlib.sha256(
            path.read_bytes().replace(str(root).encode(), b"")
        ).hexdigest()
        for path in paths
    }


def parts(run: RunDir) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.parts.glob("part-*.jsonl")}


def is_over(run: RunDir) -> bool:
    return read_situation(run).state.is_over


def attempts_of(run: RunDir) -> tuple[Attempt, ...]:
    """As `status` tells them: what finished when it was killed could not write its end."""
    return read_situation(run).history.attempts


def wait_busy(run: RunDir) -> None:
    """Until the stage has done something, or is over."""
    wait_until(f"begin of {run.run_id}", lambda: bool(read_history(run).attempts), 240, run)
    wait_until(
        "its first steps or parts",
        lambda: current_step(run) >= 3 or bool(parts(run)) or run.finished.exists(),
        120,
        run,
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_at_every_stage_it_ends_the_same_and_does_nothing_twice(tmp_path: Path) -> None:
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    finish(quiet)
    expected = digests(ChainDir(quiet / "runs" / "r1"), quiet)
    assert len(expected) >= 10

    chain = ChainDir(disturbed / "runs" / "r1")
    names, kept = open_definition(ChainDir(quiet / "runs" / "r1")).names, {}
    for name in names:
        submitted(disturbed, *words(disturbed), env={**os.environ, "R1HPC_FAILPOINT": _SLOW})
        run = chain.stage(name)
        wait_busy(run)
        kill_all(chain, run)
        kept[name] = parts(run)
    finish(disturbed)

    assert digests(chain, disturbed) == expected
    for name in names:
        now, attempts = parts(chain.stage(name)), attempts_of(chain.stage(name))
        assert {part: now[part] for part in kept[name]} == kept[name], f"{name} made a part twice"
        assert len(attempts) <= 2
        assert attempts[-1].cause is Cause.finished
    assert sum(len(read_history(chain.stage(name)).attempts) == 2 for name in names) >= 7
    assert set(actions_of(submitted(disturbed, *words(disturbed)))) == {"finished"}


def kill_all(chain: ChainDir, run: RunDir) -> None:
    """SIGKILL to the supervisor, the stage at work and its ranks."""
    pid = supervisor_pid(chain)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    kill(run)
    wait_until("everybody gone", lambda: supervisor_pid(chain) is None and not rank_pids(run), 60)


@pytest.mark.soak
@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_on_slurm_every_job_killed_it_finishes_and_does_nothing_twice(
    tmp_path: Path, idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to batch script and ranks: nobody is left to requeue, and the stages that wait are given up."""
    for name, value in idle_cluster.env(R1HPC_FAILPOINT=_SLOW).items():
        monkeypatch.setenv(name, value)
    chain = ChainDir(tmp_path / "runs" / "r1")
    slurm = ["jobs/r1.yaml", "--executor", "slurm", *_SMALL]
    killed = []
    for name in ("traces", "sft", "grpo", "reject", "sft2", "distil", "evaluate_distil"):
        jobs = {stage["stage"]: stage["job_id"] for stage in submitted(tmp_path, *slurm)["stages"]}
        run = chain.stage(name)
        wait_busy(run)
        if not run.finished.exists():
            idle_cluster.run(["scancel", "--full", "--signal=KILL", str(jobs[name])])
            killed.append(name)
        wait_until(f"end of {name}", partial(is_over, run), 120, run)
    assert len(killed) >= 5
    monkeypatch.delenv("R1HPC_FAILPOINT")
    done = submit(tmp_path, *slurm, "--follow", timeout_s=900)
    assert done.returncode == 0, done.stderr
    for stage in open_definition(chain).stages:
        attempts = attempts_of(chain.stage(stage.name))
        assert [a.cause for a in attempts].count(Cause.finished) == 1, stage.name
        assert len(attempts) <= 2
