"""logs: the end of a rank's log, and what follows it."""

import sys
from pathlib import Path

import pytest

from r1hpc import logs
from r1hpc.base.errors import StateError, UsageError
from tests.base.test_cli import Terminal
from tests.commands.commands import as_json, as_text
from tests.recorded import RecordedRun


def test_logs_shows_the_end_of_the_last_attempt(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_text(logs, ["demo", "-n", "2"], capsys) == "step 39\nstep 40\n"
    assert as_text(logs, ["demo", "--attempt", "1", "-n", "1"], capsys) == "step 25\n"
    assert len(as_json(logs, ["demo"], capsys)["lines"]) == 25
    assert logs.main(["demo", "-n", "0"]) == 0
    assert capsys.readouterr().out == ""


def test_on_a_terminal_a_long_line_is_wrapped_between_words(
    finished: RecordedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = finished.run.rank_log(2, 0)
    log.write_text(f"{'word ' * 30}\n    at = {'^' * 90}\n")
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert logs.main(["demo"]) == 0
    first, second, third = terminal.getvalue().splitlines()
    assert (len(first), second[:6], third) == (79, "  word", f"    at = {'^' * 90}")


def test_following_an_unfinished_line_shows_it_once(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.run.rank_log(2, 0).write_text("step 39\n40 %")
    assert logs.main(["demo", "--follow", "-n", "1"]) == 0
    assert capsys.readouterr().out == "40 %\n"


def test_attempts_are_numbered_from_1(finished: RecordedRun) -> None:
    with pytest.raises(UsageError, match="numbered from 1"):
        logs.main(["demo", "--attempt", "0"])


def test_a_missing_log_names_those_that_there_are(finished: RecordedRun) -> None:
    with pytest.raises(StateError, match=r"there are ranks 0$"):
        logs.main(["demo", "--rank", "3"])
    with pytest.raises(StateError, match="logs of attempts 1, 2"):
        logs.main(["demo", "--attempt", "9"])


def test_logs_before_the_first_attempt_points_at_the_supervisor(root: Path) -> None:
    made = RecordedRun(root / "demo")
    (made.run.logs / "local.out").write_text("building the dataset\n")
    with pytest.raises(StateError, match=r"logs/local\.out"):
        logs.main([])
