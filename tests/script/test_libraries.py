"""Unmodified scripts of each library: killed and stopped, they equal themselves run alone, to the bit."""

from pathlib import Path

import pytest

from r1hpc.telemetry.records.attempts import Cause
from tests.runs import at, submit, wait_over, wait_until
from tests.script.hits import SCRIPTS, alone, hit, words_of

pytestmark = pytest.mark.timeout(1200)

ALL_HITS = [Cause.crash, Cause.crash, Cause.preempted, Cause.stopped, Cause.finished]


def assert_equal(
    tmp_path: Path,
    script: str,
    *words: str,
    ranks: int = 1,
    steps: tuple[int, int, int, int] = (11, 1, 4, 7),
) -> None:
    attempts, lines = hit(tmp_path, script, *words, ranks=ranks, steps=steps)
    assert [attempt.cause for attempt in attempts] == ALL_HITS
    assert lines == alone(script, tmp_path / "alone", ranks)
    assert len(lines) > 8


@pytest.mark.soak
def test_transformers_trainer_with_two_ranks(tmp_path: Path) -> None:
    assert_equal(tmp_path, "hf_trainer.py", ranks=2)


@pytest.mark.soak
def test_transformers_trainer_is_stopped_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    assert_equal(tmp_path, "hf_trainer.py", steps=(11, 1, 20, 7))


@pytest.mark.soak
def test_a_stop_interrupts_an_evaluation_and_the_resume_repeats_it(tmp_path: Path) -> None:
    given = ["resources.gpus_per_node=0", "--", "--out", str(tmp_path / "out"), "--pause", "0.5"]
    run = submit(tmp_path, "hit", *given, job=str(SCRIPTS / "hf_trainer.py")).run
    log = run.rank_log(1, 0)
    wait_until("evaluation", lambda: log.exists() and "evaluates 18" in log.read_text(), 600, run)
    run.stop.touch()
    assert wait_over(run)[-1].last_committed_step == 18
    assert log.read_text().count("evaluates 18") < 16
    submit(tmp_path, "hit", "--resume")
    assert wait_over(run)[-1].cause is Cause.finished
    lines = words_of(run.rank_log(2, 0).read_text())
    assert lines == alone("hf_trainer.py", tmp_path / "alone")


@pytest.mark.parametrize("script", [pytest.param("trl_sft.py", marks=pytest.mark.soak), "trl_grpo.py"])
def test_trl(tmp_path: Path, script: str) -> None:
    assert_equal(tmp_path, script)


@pytest.mark.soak
def test_lightning(tmp_path: Path) -> None:
    # Step 20's save is killed: one resume is inside an epoch, one at its end.
    assert_equal(tmp_path, "lightning_fit.py", "checkpoint.save_every=5", steps=(11, 2, 4, 7))


@pytest.mark.soak
def test_lightning_killed_after_its_last_save_validates_with_the_same_random_numbers(tmp_path: Path) -> None:
    given = ["resources.gpus_per_node=0", "checkpoint.save_every=20", "--", "--out", str(tmp_path / "out")]
    faults = at("commit.rename.after:kill9:0:3:1")  # steps 20, 40 and 60, the last
    run = submit(tmp_path, "hit", *given, job=str(SCRIPTS / "lightning_fit.py"), env=faults).run
    assert [attempt.cause for attempt in wait_over(run, 600)] == [Cause.crash, Cause.finished]
    last = words_of(run.rank_log(2, 0).read_text())
    assert len(last) == 2
    assert set(last) < set(alone("lightning_fit.py", tmp_path / "alone"))


@pytest.mark.soak
def test_a_loop_on_accelerate(tmp_path: Path) -> None:
    assert_equal(tmp_path, "accelerate_loop.py", "script.resume_args=[--resume,'{checkpoint}']")
