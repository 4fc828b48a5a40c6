"""submit --follow, on run folders that were written beforehand."""

import io
import json
from pathlib import Path

import pytest

from r1hpc.reporting.follow import follow
from tests.recorded import RecordedRun


@pytest.mark.parametrize("skew", [-300, 0, 300])
def test_a_resumed_run_is_followed_from_its_new_submission(tmp_path: Path, skew: float) -> None:
    """The login node's clock differs from that of the attempts by `skew`."""
    made = RecordedRun(tmp_path / "demo")
    made.submit("local-1")
    made.attempt(1, 20, "cancelled", committed=20, detail="cancelled by a user")
    made.clock += skew
    made.submit("local-2")
    made.clock -= skew
    made.attempt(21, 40, "finished", committed=40)
    out = io.StringIO()
    assert follow(made.run, "local-2", out) == 0
    shown = out.getvalue()
    assert "attempt 2 begins" in shown
    assert "step 40" in shown
    assert "attempt 1" not in shown
    assert shown.endswith("demo: finished\n")


def test_a_run_that_failed_names_its_logs(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo")
    made.submit("local-1")
    made.attempt(1, 20, "crash", committed=0, detail="rank 0 on n1: it broke")
    out = io.StringIO()
    assert follow(made.run, "local-1", out) == 1
    assert "attempt 1 ended: crash: rank 0 on n1: it broke\n" in out.getvalue()
    assert f"see {made.run.logs}" in out.getvalue()


def test_the_cause_that_accounting_proves_is_shown(tmp_path: Path) -> None:
    """The ranks of a lost node knew no more than a SIGTERM; sacct named the node's failure later."""
    made = RecordedRun(tmp_path / "demo")
    made.submit("7", "slurm")
    start = made.clock
    made.attempt(1, 20, "preempted", committed=20)
    made.accounted("NODE_FAIL", start)
    made.attempt(21, 40, "finished", committed=40)
    out = io.StringIO()
    assert follow(made.run, "7", out) == 0
    assert "attempt 1 ended: node_fail: " in out.getvalue()
    assert "preempted" not in out.getvalue()


@pytest.fixture
def learning_nothing(tmp_path: Path) -> RecordedRun:
    """A run of reinforcement learning without a right answer, evaluated after step 20."""
    made = RecordedRun(tmp_path / "demo", num_steps=40, stage="rl")
    made.submit("local-1")
    made.begin()
    made.steps(1, 30, reward=0.0, accuracy=0.0)
    half = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = {"greedy": half, "pass_at": {"1": half}, "response_length": 5.0, "num_items": 100}
    line = {"global_step": 20, "attempt": 1, "time": made.clock, **found}
    made.run.rl_evaluations.write_text(json.dumps(line) + "\n")
    made.end("crash", committed=20)
    return made


def test_evaluations_warnings_and_the_time_left_are_shown(learning_nothing: RecordedRun) -> None:
    out = io.StringIO()
    follow(learning_nothing.run, "local-1", out)
    lines = out.getvalue().splitlines()
    assert "step 20 evaluated: greedy 0.500 [0.400, 0.600], pass@1 0.500 [0.400, 0.600]" in lines
    assert any(line.startswith("warning: not one completion of these steps was right") for line in lines)
    assert any(line.startswith("step 30") and line.endswith("10 s left") for line in lines)


def test_a_terminal_has_a_bar(learning_nothing: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    follow(learning_nothing.run, "local-1", out)
    assert "step 30 of 40  10 s left" in out.getvalue()
    assert "\x1b[" in out.getvalue()
