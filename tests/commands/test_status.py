"""status: where a run is, by its folder, its supervisor or Slurm."""

from pathlib import Path

import pytest

from r1hpc import cancel, status
from r1hpc.attempt.state import state as attempt_state
from r1hpc.attempt.state.state import JobReport, State, judge, newest_job, read_situation
from r1hpc.base.errors import StateError
from r1hpc.base.files import read_records
from r1hpc.checkpoint.complete import record_complete
from r1hpc.slurm.requeue import JobState
from r1hpc.telemetry.records.attempts import read_history
from tests.cluster import Cluster
from tests.commands.commands import Supervised, as_json, as_text, submit_recorded
from tests.recorded import RecordedRun

STATUS_KEYS = {"attempt", "cause", "start", "end", "nodes", "gpus", "first_step", "last_step"}


def test_status_of_a_finished_run(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    shown = as_json(status, ["demo"], capsys)
    assert shown["state"] == "finished"
    assert (shown["attempt"], shown["global_step"], shown["num_steps"]) == (2, 40, 40)
    assert (shown["last_committed_step"], shown["job_id"], shown["executor"]) == (40, "4711", "slurm")
    assert shown["tokens_per_second"] == 128.0
    assert (shown["eta_s"], shown["in_parts"]) == (None, False)
    assert [a["cause"] for a in shown["attempts"]] == ["node_fail", "finished"]
    assert STATUS_KEYS | {"last_committed_step"} <= set(shown["attempts"][0])
    seconds = sum(a["end"] - a["start"] for a in shown["attempts"])
    assert shown["gpu_hours"] == pytest.approx(4 * seconds / 3600)
    text = as_text(status, ["demo"], capsys)
    assert "demo: finished" in text
    assert "\x1b" not in text


def test_status_before_the_first_attempt(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(root / "demo")
    assert as_json(status, [], capsys)["state"] == "unknown"
    made.submit("4711", "slurm")
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["attempt"], shown["attempts"]) == ("queued", None, [])
    assert "as of the run folder" in shown["detail"]
    assert "no checkpoint yet" in as_text(status, [], capsys)


def test_a_checkpoint_that_a_script_wrote_itself_is_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(root / "demo")
    (root / "ckpt_120.pt").write_text("weights")
    record_complete(made.run, root / "ckpt_120.pt")
    assert "newest checkpoint ckpt_120.pt; " in as_text(status, [], capsys)


def test_a_local_run_that_was_ended_between_two_attempts_tells_how_to_go_on(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(root / "demo")
    made.submit("local-1", "local")
    made.attempt(1, 3, "preempted")
    found = judge(made.run, read_history(made.run), newest_job(made.run), JobReport(False, detail="gone"))
    assert found[1].endswith("the next attempt never began: submit --run-name demo --resume")


def submitted_and_said(root: Path, text: str) -> RecordedRun:
    """A run in Slurm's queue whose job script has printed this."""
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    log = made.run.logs / "slurm-4711.out"
    log.parent.mkdir(exist_ok=True)
    log.write_text(text)
    return made


def test_what_keeps_an_attempt_from_beginning_is_shown(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted_and_said(
        root, "r1hpc.launch: /scratch is full\nbegin failed with status 1: trying again in 30 s\n\n"
    )
    shown = as_text(status, [], capsys)
    assert "slurm-4711.out ends: begin failed with status 1: trying again in 30 s" in shown
    made.attempt(1, 3, "finished")
    assert "ends:" not in as_text(status, [], capsys)


def test_why_a_job_ended_before_its_attempt_began_is_shown(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_state, "job_state", lambda *_: JobState(frozenset({"FAILED"})))
    submitted_and_said(root, "error: submitit/4711_submitted.pkl did not appear within 60 s\n")
    shown = as_text(status, [], capsys)
    assert "failed  (job 4711 is FAILED; it never began)" in shown
    assert "slurm-4711.out ends: error: submitit/4711_submitted.pkl did not appear within 60 s" in shown


def test_of_reinforcement_learning_the_reward_is_shown(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.begin()
    made.steps(1, 3, reward=0.25, accuracy=0.125)
    shown = as_json(status, [], capsys)
    assert (shown["reward"], shown["accuracy"], shown["unit"]) == (0.25, 0.125, "node-hours")
    text = as_text(status, [], capsys)
    assert "reward 0.250, accuracy 0.125" in text
    assert "loss" not in text
    assert "node-hours so far" in text


@pytest.mark.parametrize(
    ("cause", "requeued", "state"),
    [
        ("preempted", True, "requeued"),
        ("preempted", False, "failed"),
        ("crash", False, "failed"),
        ("stopped", False, "stopped"),
        ("cancelled", False, "cancelled"),
        ("refused", False, "failed"),
    ],
)
def test_state_after_an_attempt(root: Path, cause: str, requeued: bool, state: str) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.begin()
    made.steps(1, 3)
    made.end(cause, 3, requeued=requeued)
    assert read_situation(made.run).state == state


def test_a_new_submission_after_the_end_is_queued_although_its_line_came_late(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.attempt(1, 3, "crash")
    made.submit("4712", "slurm")
    assert read_situation(made.run).state is State.queued
    submitted_at = made.clock - 5
    made.job_id = "4713"
    made.begin()
    made.clock = submitted_at
    made.submit("4713", "slurm")  # written after its begin, dated before it
    assert read_situation(made.run).state is State.running


def test_a_resumed_attempt_stands_where_it_resumed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.attempt(1, 20, "crash", committed=15)
    made.begin(resumed_from=15)
    assert as_json(status, [], capsys)["global_step"] == 15


def test_of_a_stage_in_parts_the_finished_ones_are_counted(
    in_parts: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = as_json(status, [], capsys)
    assert (shown["in_parts"], shown["global_step"], shown["num_steps"]) == (True, 7, 100)
    assert (shown["state"], shown["last_committed_step"]) == ("running", 7)
    assert shown["eta_s"] == 93 * 60.0 / 4, "by what the attempt that runs has made, its start-up included"
    text = as_text(status, [], capsys)
    assert "part 7 of 100, 23 min 15 s left" in text
    assert "checkpoint" not in text
    row = next(line for line in as_text(status, ["--all"], capsys).splitlines() if "asked" in line)
    assert row.split()[:5] == ["asked", "running", "2", "7", "100"]

    in_parts.parts(7, 99)
    in_parts.end("finished", committed=100)
    assert "part 100 of 100\n" in as_text(status, [], capsys)
    assert as_json(status, [], capsys)["eta_s"] is None


@pytest.mark.parametrize(("made", "eta_s"), [(1, 7 * 60.0 / 4), (5, 3 * 60.0 / 8), (8, None)])
def test_of_ranks_that_began_together_the_others_are_near_when_one_is_done(
    root: Path, capsys: pytest.CaptureFixture[str], made: int, eta_s: float | None
) -> None:
    """Four ranks on eight parts, a minute after the begin. With all parts made they sum up, nobody knows how
    long."""
    run = RecordedRun(root / "demo", stage="generate", num_steps=8, gpus=4)
    run.submit("4711", "slurm")
    run.begin()
    run.parts(0, made - 1, part_s=50.0 / made)
    assert as_json(status, [], capsys)["eta_s"] == pytest.approx(eta_s)


def test_before_its_first_part_nobody_knows_how_long_a_stage_takes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(root / "demo", stage="generate", num_steps=8)
    made.submit("4711", "slurm")
    made.begin()
    shown = as_json(status, [], capsys)
    assert (shown["global_step"], shown["num_steps"], shown["eta_s"]) == (0, 8, None)
    assert (shown["last_committed_step"], shown["tokens_per_second"]) == (None, None)
    assert "part 0 of 8\n" in as_text(status, [], capsys)


def test_a_torn_last_line_and_a_foreign_config_do_not_stop_status(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with finished.run.train_metrics.open("ab") as file:
        file.write(b'{"global_step": 41, "attempt": 2, "lo')
    with finished.run.attempts.open("ab") as file:
        file.write(b'{"event": "beg')
    finished.run.config.write_text("of: another\nversion: 9\n")
    shown = as_json(status, [], capsys)
    assert (shown["global_step"], shown["num_steps"], shown["state"]) == (40, None, "finished")


def test_a_living_supervisor_is_running_and_a_dead_one_has_failed(
    supervised: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    _, process = supervised
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["eta_s"]) == ("running", 20.0)
    process.kill()
    process.wait()
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["eta_s"]) == ("failed", None)
    assert str(process.pid) in shown["detail"]


@pytest.mark.slurm
def test_a_job_is_followed_by_its_states_and_cancelled(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(tmp_path / "runs" / "demo")
    job_id = submit_recorded(on_cluster, made, "--hold")
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["job_id"]) == ("queued", str(job_id))
    assert "PENDING (JobHeldUser)" in shown["detail"]
    on_cluster.run(["scontrol", "release", str(job_id)])
    on_cluster.wait_job(job_id, {"RUNNING"})
    made.begin()
    assert as_json(status, [], capsys)["state"] == "running"

    other = RecordedRun(tmp_path / "runs" / "other")
    other.submit(str(job_id), "slurm")
    with pytest.raises(StateError, match="does not name other"):
        cancel.main(["other"])
    assert on_cluster.state(job_id) == "RUNNING"

    assert as_json(cancel, ["demo"], capsys)["action"] == "scancel"
    assert on_cluster.wait_job(job_id) == "CANCELLED"
    assert as_json(status, ["demo"], capsys)["state"] == "cancelled"
    assert read_records(made.run.attempts)[-1]["event"] == "cancel_requested"
