"""Chains through the submit command with Slurm faked at its edge: what is submitted, tied, found, refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.files import read_json, read_records
from r1hpc.config import load
from r1hpc.submission.chain.file import open_definition
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.chain.next_job import move_dependents
from tests.runs import CHECKOUT, command_output, run_environment
from tests.submission.chains import THREE, actions_of, jobs_of, submit, submitted, write_attempt, write_chain
from tests.submission.fake_slurm import FakeSlurm


class Place:
    """A chain file, a run root and a Slurm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slurm = FakeSlurm(root)
        self.file = write_chain(root)
        self.chain = ChainDir(root / "runs" / "small")

    def environment(self, **extra: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.slurm.bin}:{os.environ['PATH']}", **extra}

    def submit(self, *words: str) -> dict[str, Any]:
        return submitted(self.root, str(self.file), *words, env=self.environment())

    def command(self, name: str, *words: str, on_chain: bool = True) -> str:
        """stdout of another command on the chain."""
        argv = ["-m", f"r1hpc.{name}", *(["small"] if on_chain else []), *words]
        return command_output([*argv, "--run-root", str(self.root / "runs")], self.environment())

    def refused(self, *words: str) -> str:
        done = submit(self.root, *words, env=self.environment())
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_each_stage_is_a_job_that_waits_for_what_it_needs(place: Place) -> None:
    answer = place.submit(
        "train.num_steps=7", "two:resources.nodes=2", "train.micro_batch_size=2", "-d", "afterok:99"
    )
    assert jobs_of(answer) == ["1", "2", "3"]
    jobs = place.slurm.jobs()
    assert [job.dependency for job in jobs] == [
        "afterok:99",
        "afterok:99,afterok:1",
        "afterok:99,afterok:1:2",
    ]
    assert [job.kill_on_invalid for job in jobs] == ["", "yes", "yes"]
    assert [job.folder for job in jobs] == [
        str(place.chain.stage(name).path) for name in ("one", "two", "three")
    ]
    assert [job.name for job in jobs] == ["small.one", "small.two", "small.three"]
    configs = [load.read(place.chain.stage(name).config) for name in ("one", "two", "three")]
    assert [config.resources.nodes for config in configs] == [1, 2, 1]
    assert {config.train.num_steps for config in configs} == {7}
    assert read_json(place.chain.stage("three").path / "needs.json") == {"needs": ["one", "two"]}
    assert place.chain.path.stat().st_mode & 0o077 == 0


def test_a_second_submission_leaves_alone_what_waits_or_runs(place: Place) -> None:
    place.submit()
    write_attempt(place.chain, "one", "1", None)
    place.slurm.set_state("1", "RUNNING")
    answer = place.submit()
    assert actions_of(answer) == ["at work"] * 3
    assert jobs_of(answer) == ["1", "2", "3"]
    assert len(place.slurm.jobs()) == 3


def test_what_finished_is_left_out_and_what_failed_is_resumed(place: Place) -> None:
    place.submit()
    write_attempt(place.chain, "one", "1", "finished")
    write_attempt(place.chain, "two", "2", "crash")
    place.slurm.set_state("1", "COMPLETED")
    place.slurm.set_state("2", "FAILED")
    answer = place.submit("two:limits.max_crashes=3")
    assert actions_of(answer) == ["finished", "resumed", "submitted again"]
    assert jobs_of(answer) == [None, "4", "5"]
    jobs = place.slurm.jobs()
    assert [job.state for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED", "PENDING", "PENDING"]
    assert [job.dependency for job in jobs[3:]] == ["", "afterok:4"]
    assert load.read(place.chain.stage("two").config).limits.max_crashes == 3


def test_a_stage_that_slurm_gave_up_is_submitted_anew(place: Place) -> None:
    """kill-on-invalid-dep: its predecessor failed, so it was cancelled before it began."""
    place.submit()
    write_attempt(place.chain, "one", "1", "crash")
    for job_id, state in (("1", "FAILED"), ("2", "CANCELLED"), ("3", "CANCELLED")):
        place.slurm.set_state(job_id, state)
    answer = place.submit()
    assert actions_of(answer) == ["resumed"] * 3
    assert [job.dependency for job in place.slurm.jobs()[3:]] == ["", "afterok:4", "afterok:4:5"]


_POINTS = (
    "chain.frozen",
    "chain.submitting",
    "submit.written",
    "sbatch.answered",  # the first job is there, without its payload and without a record
    "sbatch.answered",  # while it is being adopted
    "submit.asked",
    "chain.submitted",
)


def test_a_kill_at_any_point_of_the_submission_does_nothing_twice(place: Place) -> None:
    for point in _POINTS:
        environment = place.environment(R1HPC_FAILPOINT=f"{point}:kill9")
        assert submit(place.root, str(place.file), env=environment).returncode == -9, point
    answer = place.submit()
    jobs = place.slurm.jobs()
    assert [job.folder for job in jobs] == [
        str(place.chain.stage(name).path) for name in ("one", "two", "three")
    ]
    assert [job.dependency for job in jobs] == ["", "afterok:1", "afterok:1:2"]
    assert jobs_of(answer) == ["1", "2", "3"]
    for job, name in zip(jobs, ("one", "two", "three"), strict=True):
        run = place.chain.stage(name)
        events = [event["job_id"] for event in read_records(run.attempts) if event["event"] == "submitted"]
        assert events == [job.job_id]
        assert (run.path / "submitit" / f"{job.job_id}_submitted.pkl").is_file()
    assert actions_of(place.submit()) == ["at work"] * 3


def test_a_job_whose_payload_could_not_be_written_keeps_its_folder_and_is_adopted(place: Place) -> None:
    sbatch = place.slurm.bin / "sbatch"
    whole = sbatch.read_text()
    away = 'for last; do :; done\n[ "$1" = --version ] || rm -r "${last%/*}/submitit"\n'
    sbatch.write_text(whole.replace("exec ", "") + away)
    failed = submit(place.root, str(place.file), env=place.environment())
    assert failed.returncode == 1
    assert "job 1 was queued, but the file its ranks read could not be written" in failed.stderr
    run = place.chain.stage("one")
    assert f"{run.path} is kept for it" in failed.stderr
    sbatch.write_text(whole)
    assert jobs_of(place.submit()) == ["1", "2", "3"]
    assert (run.path / "submitit" / "1_submitted.pkl").is_file()


def test_those_that_wait_follow_a_stage_into_its_next_job(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Slurm may not requeue, the run is submitted anew from inside its old job."""
    place.submit()
    monkeypatch.setenv("PATH", place.environment()["PATH"])
    assert move_dependents(place.chain.stage("one"), "77") == ["2", "3"]
    assert [job.dependency for job in place.slurm.jobs()] == ["", "afterok:77", "afterok:77:2"]


def test_two_submissions_at_once_are_one(place: Place) -> None:
    halted = place.environment(R1HPC_FAILPOINT="submit.asked:stop::1")
    argv = [sys.executable, "-m", "r1hpc.submit", str(place.file), "--run-root", str(place.root / "runs")]
    first = subprocess.Popen(argv, cwd=CHECKOUT, env=run_environment(halted), stdout=subprocess.DEVNULL)
    while not place.slurm.jobs():
        assert first.poll() is None
    assert "is locked: a submission, process" in place.refused(str(place.file))
    _, status = os.waitpid(first.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert len(place.slurm.jobs()) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.lr=1e-4",), "stage one is at work: train.lr cannot change any more"),
        (("data.seq_len=32",), "data.seq_len cannot change"),
        (("nope:train.lr=1",), "there is no stage 'nope'"),
        (("train.lr=x",), "train.lr"),
    ],
)
def test_what_is_at_work_cannot_become_something_else(
    place: Place, words: tuple[str, ...], said: str
) -> None:
    place.submit()
    assert said in place.refused(str(place.file), *words)
    assert len(place.slurm.jobs()) == 3


def test_a_stage_at_work_keeps_its_settings_and_the_chain_knows_it(place: Place) -> None:
    """Its job is in the queue as it is, and a resume goes by what that was."""
    place.submit()
    answer = place.submit("three:resources.time=1-00:00:00")
    (note,) = [note for note in answer["notes"] if "keeps its" in note]
    assert note.startswith("stage three is at work or in the queue and keeps its resources.time")
    assert {load.read(place.chain.stage("three").config).resources.time} == {"00:20:00"}
    assert open_definition(place.chain).stage("three").config.resources.time == "00:20:00"


def test_a_resume_of_a_chain_that_is_not_there_begins_none(place: Place) -> None:
    said = place.refused(str(place.file), "--resume", "--run-name", "smal")
    assert f"there is no chain called smal in {place.root}/runs" in said
    assert not place.slurm.jobs()


@pytest.mark.parametrize(
    ("of_before", "words", "said"),
    [
        ("stage: traces", "model: {path: '${stage:b}/model'}", "stage b (traces) leaves traces.jsonl alone"),
        ("stage: pretrain", "model: {path: '${stage:b}/modle'}", "stage b (pretrain) leaves model alone"),
        (
            "stage: pretrain",
            "stage: sft\n    data: {recipe: null, traces: ['${stage:b}/traces.jsonl']}",
            "stage b (pretrain) leaves model alone",
        ),
    ],
)
def test_what_no_stage_will_leave_is_refused(place: Place, of_before: str, words: str, said: str) -> None:
    """Before the stages ahead of it have run."""
    write_chain(place.root, f"  - name: b\n    {of_before}\n  - name: c\n    {words}\n")
    assert said in place.refused(str(place.file), "--dry-run", "task.name=chain_sum")


def test_a_changed_file_is_named_and_another_chain_refused(place: Place) -> None:
    place.submit()
    write_chain(place.root, THREE + "  - name: four\n")
    answer = place.submit()
    assert "has changed since small was begun" in str(answer["notes"])
    assert len(place.slurm.jobs()) == 3
    other = place.root / "other.yaml"
    other.write_text(place.file.read_text())
    assert actions_of(submitted(place.root, str(place.file), env=place.environment())) == ["at work"] * 3
    other.write_text(place.file.read_text().replace("four", "five"))
    assert "is a chain of" in place.refused(str(other), "--run-name", "small")


def test_what_cannot_be_leaves_nothing(place: Place) -> None:
    assert "stage three: model.path" in place.refused(str(place.file), "three:model.path=nowhere")
    assert not (place.root / "runs" / "small").exists()
    (place.slurm.bin / "sbatch").write_text(
        '#!/bin/sh\n[ "$1" = --version ] || { echo "Invalid account" >&2; exit 1; }\n'
    )
    done = submit(place.root, str(place.file), env=place.environment())
    assert done.returncode == 1
    assert "stage one: " in done.stderr
    assert "Invalid account" in done.stderr
    assert not (place.root / "runs" / "small").exists()


def test_a_dry_run_plans_each_stage_and_writes_nothing(place: Place) -> None:
    """Also the model that an earlier stage has yet to write: its shape is known."""
    write_chain(place.root, '  - name: a\n  - name: b\n    model: {path: "${stage:a}/model"}\n')
    answer = place.submit("--dry-run", "--executor", "slurm")
    plans = [stage["plan"]["num_parameters"] for stage in answer["stages"]]
    assert plans[0] == plans[1]
    assert plans[0] > 300_000
    assert jobs_of(answer) == [None, None]
    assert not place.slurm.jobs()
    assert not (place.root / "runs").exists()


def test_the_commands_show_and_cancel_a_chain(place: Place) -> None:
    place.submit()
    write_attempt(place.chain, "one", "1", None)
    place.slurm.set_state("1", "RUNNING")
    shown = json.loads(place.command("status", "--json"))
    assert (shown["state"], shown["detail"]) == ("running", "0 of 3 stages finished")
    assert [stage["state"] for stage in shown["stages"]] == ["running", "waiting", "waiting"]
    assert shown["stages"][2]["needs"] == ["one", "two"]
    everything = json.loads(place.command("status", "--all", "--json", on_chain=False))
    assert [chain["chain"] for chain in everything["chains"]] == ["small"]
    cancelled = json.loads(place.command("cancel", "--json"))
    assert [stage["stage"] for stage in cancelled["stages"]] == ["three", "two", "one"]
    assert {job.state for job in place.slurm.jobs()} == {"CANCELLED"}
    assert json.loads(place.command("status", "--json"))["state"] == "cancelled"
    assert json.loads(place.command("cancel", "--json"))["stages"] == []
    reviews = json.loads(place.command("report", "--json", "--no-plots"))["runs"]
    assert [review["run_id"] for review in reviews] == ["one", "two", "three"]


def test_a_run_is_no_chain_and_a_chain_no_run(place: Place) -> None:
    submitted(place.root, "jobs/smoke.yaml", "--run-name", "plain", env=place.environment())
    assert "is no chain" in place.refused(str(place.file), "--run-name", "plain")
    place.submit()
    assert "there is a run called small" in place.refused("jobs/smoke.yaml", "--run-name", "small")
    inside = place.environment(SLURM_JOB_ID="7")
    done = submit(place.root, str(place.file), "--run-name", "x", "--prepare-only", env=inside)
    assert "is a chain of stages" in done.stderr
