"""r1hpc from Python, with a run that really runs on this machine."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import r1hpc
from r1hpc import Run, Submission, submit
from r1hpc.attempt.state.state import State
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.telemetry.records.attempts import Cause
from tests.recorded import RecordedRun
from tests.runs import run_environment
from tests.submission.chains import TRACES

_JOB = TRACES.partition("stages:")[0] + "stage: traces\n"
"""Demonstrations need no model: the quickest real run."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in run_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    path = tmp_path / "job.yaml"
    path.write_text(_JOB)
    return path


def test_a_run_is_submitted_waited_for_and_gone_on_with(job: Path, tmp_path: Path) -> None:
    done = submit(job, run_name="a", executor="local", overrides={"generate.num_items": 20})
    assert isinstance(done, Submission)
    assert done.job_id is not None
    assert done.job_id.startswith("local-")
    assert done.run.path == tmp_path / "runs" / "a"
    assert done.run.folder.script.read_text() == done.script
    assert done.run.wait(timeout_s=120) is State.finished
    run = Run("a")
    assert [attempt.cause for attempt in run.attempts] == [Cause.finished]
    assert run.gpu_hours == 0.0
    assert len(run.folder.traces.read_text().splitlines()) == 20
    assert run.cancel().action == "none"
    with pytest.raises(UsageError, match="is finished"):
        run.resume(executor="local")


def test_a_run_that_goes_on_is_cancelled(job: Path) -> None:
    done = submit("jobs/smoke.yaml", run_name="b", executor="local", overrides=["train.num_steps=100000"])
    assert isinstance(done, Submission)
    with pytest.raises(R1hpcError, match=r"b is \w+ after 0 s"):
        done.run.wait(timeout_s=0)
    assert done.run.cancel().action == "sigterm"
    assert done.run.wait(timeout_s=120) is State.cancelled


def test_a_dry_run_writes_nothing(job: Path, tmp_path: Path) -> None:
    where = {"train.lr": 1e-5, "resources.time": "12:00:00"}
    done = submit("jobs/smoke.yaml", nodes=2, overrides=where, dry_run=True, executor="slurm")
    assert isinstance(done, Submission)
    assert (done.job_id, done.plan.topology.num_nodes) == (None, 2)
    assert done.planned.config.train.lr == 1e-5
    assert "#SBATCH --time=12:00:00" in done.script.splitlines()
    assert done.estimate is not None
    with pytest.raises(UsageError, match="no run at"):
        _ = done.run
    assert not (tmp_path / "runs").exists()


def test_a_chain_has_its_stages(tmp_path: Path, job: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(TRACES)
    done = submit(path, executor="local", overrides={"one:generate.num_items": 30}, dry_run=True)
    assert isinstance(done, r1hpc.ChainSubmission)
    assert done.job_ids == {}
    assert list(done.planned) == ["one", "two", "three"]
    assert done.planned["one"].config.generate.num_items == 30


def test_the_metrics_are_the_steps_that_lasted(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "runs" / "demo", gpus=4)
    made.submit("4711", "slurm")
    made.attempt(1, 25, "node_fail", committed=15)
    made.attempt(16, 40, "finished", committed=40)
    run = Run("demo", run_root=tmp_path / "runs")
    assert [step.global_step for step in run.metrics()] == list(range(1, 41))
    assert [step.attempt for step in run.metrics()] == [1] * 15 + [2] * 25
    assert run.gpu_hours > 0
    assert run.state() is State.finished


def test_what_is_not_there_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run at"):
        Run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"train\.num_steps"):
        submit("jobs/smoke.yaml", overrides={"train.num_step": 4}, dry_run=True)
    with pytest.raises(UsageError, match=r"configs/cluster/NAME\.yaml"):
        submit("jobs/smoke.yaml", overrides=["cluster.setup=[touch x]"], dry_run=True)


@pytest.mark.parametrize(
    "imports",
    [
        "from r1hpc import submit; import r1hpc.submit as module",
        "import r1hpc.submit as module; from r1hpc import submit",
        "import r1hpc.submit; from r1hpc import submit; module = r1hpc.submit",
    ],
)
def test_submit_is_the_function_and_the_module_of_the_command(imports: str) -> None:
    check = "assert callable(submit) and callable(module.main)"
    call = "print(submit('jobs/smoke.yaml', dry_run=True, executor='slurm', run_name='x').plan.num_steps)"
    command = [sys.executable, "-c", f"{imports}; {check}; {call}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout == "60\n"


@pytest.mark.parametrize("before", ["", "import r1hpc.attempt.end; "])
def test_a_training_script_calls_attempt(before: str) -> None:
    code = f"{before}from r1hpc import attempt; run = attempt(); print(run.world_size, attempt() is run)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 True\n"


def test_the_module_is_one_object() -> None:
    assert id(importlib.import_module("r1hpc.submit")) == id(r1hpc.submit)
    with pytest.raises(AttributeError, match="nope"):
        _ = r1hpc.nope
