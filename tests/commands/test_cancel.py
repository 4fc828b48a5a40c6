"""cancel: the job of this run and of this user, and no other."""

import os
import socket
from pathlib import Path

import pytest

from r1hpc import cancel
from r1hpc.attempt.state.cancel import cancel_job, check_is_ours
from r1hpc.attempt.state.state import State, read_situation
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.files import read_records
from tests.commands.commands import Supervised, as_json, as_text
from tests.recorded import RecordedRun


def test_a_reused_pid_is_not_the_supervisor(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit(f"local-{os.getpid()}")
    made.begin(host=socket.gethostname())
    assert read_situation(made.run).state is State.failed
    assert "not demo's" in cancel_job(made.run, read_situation(made.run)).text  # this process lives on


def test_a_supervisor_that_ends_at_this_moment_is_no_error(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, process = supervised
    situation = read_situation(made.run)
    process.terminate()
    process.wait(10)
    for is_seen in (False, True):  # before and after the last look at it
        monkeypatch.setattr("r1hpc.attempt.state.cancel.is_of_run", lambda *_, is_seen=is_seen: is_seen)
        assert "nothing of demo runs any more" in cancel_job(made.run, situation).text
    assert read_situation(made.run).state is State.cancelled


def test_a_run_on_another_host_is_left_to_that_host(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit("local-1")
    made.begin(host="elsewhere")
    situation = read_situation(made.run)
    assert situation.state is State.running
    assert "elsewhere" in situation.detail
    with pytest.raises(StateError, match="cancel it there"):
        cancel.main(["demo"])


def test_cancel_terminates_the_supervisor_and_leaves_word(
    supervised: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    made, process = supervised
    assert as_json(cancel, ["demo"], capsys)["action"] == "sigterm"
    assert process.wait(10) == 7
    assert read_records(made.run.attempts)[-1]["event"] == "cancel_requested"
    assert read_situation(made.run).state is State.cancelled
    assert as_json(cancel, ["demo"], capsys)["action"] == "none"


def test_without_a_name_it_cancels_none(supervised: Supervised) -> None:
    _, process = supervised
    with pytest.raises(UsageError, match=r"needs the name of a run: python -m r1hpc\.status --all"):
        cancel.main([])
    assert process.poll() is None


def test_save_first_only_touches_stop(supervised: Supervised, capsys: pytest.CaptureFixture[str]) -> None:
    made, process = supervised
    assert "saves after the step under way" in as_text(cancel, ["demo", "--save-first"], capsys)
    assert made.run.stop.exists()
    assert process.poll() is None
    assert read_situation(made.run).state is State.running


def test_a_finished_run_is_not_cancelled(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.run.attempts.read_bytes()
    assert "finished already" in as_text(cancel, ["demo"], capsys)
    assert finished.run.attempts.read_bytes() == before


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("JobId=7 JobName=demo UserId=mallory(4242) Command=/x/demo/job.sh", "not yours"),
        ("JobId=7 JobName=other UserId=me({uid}) Command=/x/demonstration/job.sh", "does not name demo"),
        ("", "not yours"),
    ],
)
def test_a_job_of_another_user_or_run_is_never_cancelled(root: Path, shown: str, reason: str) -> None:
    made = RecordedRun(root / "demo")
    made.submit("7", "slurm")
    job = read_situation(made.run).job
    assert job is not None
    with pytest.raises(StateError, match=reason):
        check_is_ours(made.run, job, shown.format(uid=os.getuid()))
    check_is_ours(made.run, job, f"JobId=7 UserId=me({os.getuid()}) Command={made.run.script} WorkDir=/home")


def test_cancel_says_what_to_do_where_there_is_no_slurm(root: Path) -> None:
    RecordedRun(root / "demo").submit("7", "slurm")
    with pytest.raises(R1hpcError, match="login node"):
        cancel.main(["demo"])
