"""The process behind a verdict may hang, die or be killed; the caller gets its answer."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from r1hpc.base.errors import R1hpcError
from r1hpc.tasks.grading.verifier import Question, StopAsked, Verifier
from r1hpc.tasks.sandbox.process import WorkerProcess

pytestmark = pytest.mark.usefixtures("no_process_left")

_SLOW = "$(x+y+z+w+a+b+c+1)^{20}$"
"""SymPy multiplies it out, for more than 20 s."""


def _questions(*answers: str) -> list[Question]:
    return [Question(text, "4", {}) for text in answers]


def _pid(verifier: Verifier) -> int:
    assert verifier._worker is not None
    return verifier._worker.pid


def test_verdicts_come_in_order() -> None:
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        assert verifier.check(_questions("4", "5", " 4\n", "4 4", "")) == [True, False, True, False, False]
        assert verifier.check([]) == []
        assert verifier.stats.checked == 5


def test_more_than_a_chunk_and_more_than_a_pipe_holds() -> None:
    texts = [f"{number:0200d}" for number in range(1500)]
    with closing(Verifier("exact", {}, 30.0)) as verifier:
        verdicts = verifier.check([Question(text, texts[7], {}) for text in texts])
    assert [index for index, right in enumerate(verdicts) if right] == [7]


def test_a_long_answer_is_refused_unseen() -> None:
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        assert verifier.check(_questions("4" * 10**7, "4")) == [False, True]
        assert verifier.stats.refused == 1


def test_equal_texts_of_different_items_are_judged_apart() -> None:
    with closing(Verifier("countdown", {}, 5.0)) as verifier:
        first, second = {"numbers": [1, 2], "target": 3}, {"numbers": [1, 2], "target": 4}
        assert verifier.check([Question("1+2", "", first), Question("1+2", "", second)]) == [True, False]


def test_asked_to_stop_a_slow_judge_is_left_between_two_answers() -> None:
    answers = iter([False, False, True])
    with closing(Verifier("math", {}, 6.0)) as verifier:
        with pytest.raises(StopAsked):
            verifier.check(_questions("4", "5", "6", "7"), lambda: next(answers))
        assert verifier.check(_questions("4")) == [True]


def test_a_slow_answer_is_wrong_and_the_next_is_judged() -> None:
    with closing(Verifier("math", {}, 6.0)) as verifier:
        verifier.check(_questions("4"))
        started = time.monotonic()
        assert verifier.check(_questions(_SLOW)) == [False]
        assert time.monotonic() - started < 20.0
        assert verifier.failed == [True]
        assert verifier.check(_questions("4", r"\frac{8}{2}", "5")) == [True, True, False]
        assert verifier.failed == [False] * 3
        assert (verifier.stats.timeouts, verifier.stats.restarts) == (1, 1)
        assert verifier.sentences == ["judge math took over 6 s (reward.timeout_s)"]
        assert verifier.stats.failures == 0, "no code of a user's failed"


def test_a_stopped_process_is_replaced() -> None:
    with closing(Verifier("exact", {}, 6.0)) as verifier:
        verifier.check(_questions("4"))
        os.kill(_pid(verifier), signal.SIGSTOP)
        assert verifier.check(_questions("4", "5")) == [True, False], (
            "a chunk that failed is asked one by one"
        )
        assert (verifier.stats.timeouts, verifier.stats.restarts) == (0, 1)


def test_a_killed_process_is_replaced() -> None:
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        verifier.check(_questions("4"))
        os.kill(_pid(verifier), signal.SIGKILL)
        assert verifier.check(_questions("4")) == [True]
        assert (verifier.stats.crashes, verifier.stats.restarts) == (0, 1)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]
)
def test_signals_to_the_job_step_do_not_reach_it(number: signal.Signals) -> None:
    """Slurm sends them to every process of a step, and the trainer goes on to save."""
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        os.kill(_pid(verifier), number)  # perhaps before it has started
        assert verifier.check(_questions("4")) == [True]
        os.kill(_pid(verifier), number)
        assert verifier.check(_questions("4")) == [True]
        assert verifier.stats.restarts == 0


def test_closing_twice_is_closing_once() -> None:
    verifier = Verifier("exact", {}, 5.0)
    verifier.close()
    verifier.close()


def test_a_verifier_that_is_forgotten_leaves_no_process() -> None:
    verifier = Verifier("exact", {}, 5.0)
    pid = _pid(verifier)
    del verifier
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("hanging", [False, True])
def test_the_process_dies_with_its_parent(tmp_path: Path, hanging: bool) -> None:
    code = (
        "import os, sys, time; from r1hpc.tasks.grading.verifier import Question, Verifier;"
        "v = Verifier('math', {}, 60.0); v.check([Question('4', '4', {})]);"
        "open(sys.argv[1], 'w').write(str(v._worker.pid));"
        "v.check([Question(sys.argv[2], '4', {})]); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pid"), _SLOW if hanging else "4"]
    parent = subprocess.Popen(command)
    _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.2)
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    _wait_for(lambda: not _runs(pid))


def _wait_for(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """An orphan may stay a zombie where nobody reaps it; that is dead enough."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    worker = WorkerProcess("r1hpc.tasks.nonexistent", [])
    with pytest.raises(R1hpcError, match="did not start"):
        worker.wait_ready(60.0)
    worker.stop()
    assert "nonexistent" in capfd.readouterr().err


def test_it_starts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the current folder was imported')")
    monkeypatch.chdir(tmp_path)
    with closing(Verifier("exact", {}, 5.0)) as verifier:
        assert verifier.check(_questions("4")) == [True]
