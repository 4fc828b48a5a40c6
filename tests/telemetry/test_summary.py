"""summary.json: what is read from it is what the files say, whatever happens to the run in between."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc.base.files import append_record
from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.diagnosis.summary import RunSummary, names_of, summarise_run
from r1hpc.telemetry.records import metrics
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.records.summary_file import read_summary
from tests.recorded import RecordedRun
from tests.telemetry.counting import calls_of


def summary_of(run: RunDir, now: float = 0.0, running: bool = False) -> RunSummary:
    return summarise_run(run, read_history(run), now, running)


def afresh(run: RunDir, now: float = 0.0, running: bool = False) -> RunSummary:
    """The same without what is stored, which stays as it was."""
    path = run.summary
    kept = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    found = summary_of(run, now, running)
    path.unlink(missing_ok=True)
    if kept is not None:
        path.write_bytes(kept)
    return found


@pytest.fixture
def steps_parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many lines of train.jsonl were parsed since it was called last."""
    return calls_of(monkeypatch, metrics, "_to_step")


@pytest.fixture
def made(tmp_path: Path) -> RecordedRun:
    run = RecordedRun(tmp_path / "demo", gpus=8)
    run.submit("local-1")
    run.attempt(1, 20, "preempted", committed=15, save_every=5)
    return run


def test_the_steps_of_attempts_that_are_over_are_read_once(
    made: RecordedRun, steps_parsed: Callable[[], int]
) -> None:
    made.attempt(16, 40, "finished", committed=40, save_every=5)
    first = summary_of(made.run)
    assert steps_parsed() > 0
    assert summary_of(made.run) == first
    assert steps_parsed() == 0
    assert [a.attempt.first_step for a in first.attempts] == [1, 16]
    assert (first.num_useful, first.num_lost, first.last_step) == (40, 5, 40)


def test_of_a_run_at_work_only_the_newest_attempt_is_read(
    made: RecordedRun, steps_parsed: Callable[[], int]
) -> None:
    made.begin(resumed_from=15)
    made.steps(16, 30)
    summary_of(made.run, made.clock, running=True)
    steps_parsed()
    made.steps(31, 33, startup_s=0)
    found = summary_of(made.run, made.clock, running=True)
    assert steps_parsed() == 2 * 18, "by read_history and by the summary"
    assert found == afresh(made.run, made.clock, running=True)
    assert found.attempts[-1].end == made.clock


def test_steps_that_a_later_attempt_takes_again_are_lost_from_then_on(made: RecordedRun) -> None:
    """Its checkpoint of step 15 was damaged: the next attempt begins from step 10."""
    assert summary_of(made.run).num_lost == 5
    made.begin(resumed_from=10)
    assert summary_of(made.run, made.clock, running=True).num_lost == 5
    made.steps(11, 12)
    found = summary_of(made.run, made.clock, running=True)
    assert (found.attempts[0].num_lost, found.num_useful) == (10, 12)
    made.end("preempted", committed=12)
    assert summary_of(made.run) == afresh(made.run)


@pytest.mark.parametrize("seed", range(25))
def test_what_is_stored_is_what_the_files_say_at_every_moment(tmp_path: Path, seed: int) -> None:
    """Attempts resume from anywhere, end as they like or without a record; kills tear lines, ghosts write."""
    dice = random.Random(seed)
    made = RecordedRun(tmp_path / "demo", gpus=4)
    made.submit("local-1")
    reached = committed = 0
    for _ in range(6):
        first = dice.randint(max(0, committed - 4), committed) + 1
        made.begin(resumed_from=first - 1 or None)
        for _ in range(dice.randint(0, 3)):
            last = first + dice.randint(0, 6)
            made.steps(first, last, save_every=3, startup_s=dice.choice([0, 5]))
            reached, first = last, last + 1
            _check(made, running=True)
        if dice.random() < 0.4:
            with made.run.train_metrics.open("ab") as file:
                file.write(b'{"global_step": 7, "atte')
        if dice.random() < 0.2 and made.attempts > 1:
            MetricWriter(made.run, made.attempts - 1).step(
                global_step=reached, time=made.clock, step_time_s=1.0
            )
        _check(made, running=dice.random() < 0.5)
        committed = dice.randint(min(committed, reached), reached)
        if dice.random() < 0.9:
            made.end(dice.choice(["preempted", "crash", "node_fail"]), committed)
        _check(made, running=False)
    made.attempt(committed + 1, committed + 5, "finished", committed=committed + 5)
    _check(made, running=False)
    assert summary_of(made.run).last_step == committed + 5


def _check(made: RecordedRun, running: bool) -> None:
    now = made.clock + 3
    found = summary_of(made.run, now, running)
    assert found == afresh(made.run, now, running)
    assert found == summary_of(made.run, now, running), "and once more, now from what is stored"
    for each in found.attempts:
        assert each.split.allocated == round(1000 * each.end) - round(1000 * each.attempt.start)


def _rewrite_steps(run: RunDir) -> None:
    text = run.train_metrics.read_text().replace('"step_time_s": 1.0', '"step_time_s": 0.5')
    run.train_metrics.write_text(text)


def _late_save(run: RunDir) -> None:
    last = read_history(run).attempts[-1]
    event = {"event": "save", "attempt": last.attempt, "time": last.end, "seconds": 1.5}
    append_record(run.metrics / "events.jsonl", event)


def _other_end(run: RunDir) -> None:
    text = run.attempts.read_text().replace('"last_committed_step": 40', '"last_committed_step": 30')
    run.attempts.write_text(text.replace('"cause": "finished"', '"cause": "crash"'))


def _damage(run: RunDir) -> None:
    value = json.loads(run.summary.read_text())
    value["attempts"][0]["split"] = [1.5, "x"]
    run.summary.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        _rewrite_steps,
        _late_save,
        _other_end,
        _damage,
        lambda run: run.train_metrics.unlink(),
        lambda run: run.summary.write_bytes(b"\xff\x00" * 50),
        lambda run: run.summary.write_text("[]"),
        lambda run: os.truncate(run.summary, 40),
    ],
)
def test_a_summary_that_is_older_than_its_run_or_damaged_is_made_again(
    made: RecordedRun, change: Callable[[RunDir], object]
) -> None:
    made.attempt(16, 40, "finished", committed=40, save_every=5)
    summary_of(made.run)
    change(made.run)
    found = summary_of(made.run)
    assert found == afresh(made.run)
    stored = read_summary(made.run)
    assert stored is not None
    assert [each.num_steps for each in stored.attempts] == [each.num_steps for each in found.attempts]


def test_where_the_folder_cannot_be_written_it_is_computed_each_time(
    made: RecordedRun, steps_parsed: Callable[[], int]
) -> None:
    made.run.summary.mkdir()  # stands for a colleague's folder: also root cannot replace it by a file
    first = summary_of(made.run)
    steps_parsed()
    assert summary_of(made.run) == first
    assert steps_parsed() > 0
    assert list(made.run.path.glob(".summary*")) == []


def test_lines_that_hold_no_step_are_counted(made: RecordedRun) -> None:
    with made.run.train_metrics.open("ab") as file:
        file.write(b"\x00\xff rubbish\n" + b'{"global_step": 3, "attempt": 1, "time": "noon"}\n' + b"[[[[\n")
    made.attempt(16, 40, "finished", committed=40)
    for _ in range(2):
        assert summary_of(made.run).num_bad_lines == 3
    assert summary_of(made.run).num_useful == 40


def test_names_follow_the_configuration(made: RecordedRun) -> None:
    assert names_of(made.run) == ("pretrain", "demo")
    summary_of(made.run)
    text = made.run.config.read_text().replace("stage: pretrain", "stage: sft")
    made.run.config.write_text(text.replace("job_name: null", "job_name: 'my job'"))
    assert names_of(made.run) == ("sft", "my job")
    assert summary_of(made.run).stage == "sft"
    made.run.config.write_bytes(b"\xff\x00")
    assert names_of(made.run) == ("pretrain", "demo")


def test_an_attempt_that_was_taken_for_dead_and_lives_counts_until_now(made: RecordedRun) -> None:
    made.begin(resumed_from=15)
    made.steps(16, 18)
    assert summary_of(made.run).attempts[-1].end == made.clock
    assert summary_of(made.run, made.clock + 60, running=True).attempts[-1].end == made.clock + 60
