"""What all commands that open a run folder have in common."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1hpc import status
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import append_record
from r1hpc.base.run_dir import RunDir
from tests.commands.commands import as_json
from tests.recorded import RecordedRun


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "report"])
def test_a_command_is_light_and_answers_a_wrong_flag_with_the_right_one(command: str, tmp_path: Path) -> None:
    heavy = "'torch', 'deepspeed', 'transformers', 'zarr', 'matplotlib', 'submitit'"
    code = f"import sys, r1hpc.{command}; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    argv = [sys.executable, "-m", f"r1hpc.{command}", "--run-rot", str(tmp_path)]
    wrong = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--run-root" in wrong.stderr
    nothing = subprocess.run(
        [*argv[:3], "--run-root", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert ("status --all" if command == "cancel" else "R1HPC_RUN_ROOT") in nothing.stderr
    assert "Traceback" not in nothing.stderr


def test_without_a_run_dir_the_newest_run_is_meant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, name in ((20, "old"), (10, "new")):
        made = RecordedRun(root / name)
        os.utime(made.run.config, (time.time() - age, time.time() - age))
    assert as_json(status, [], capsys)["run_id"] == "new"
    assert as_json(status, ["old"], capsys)["run_id"] == "old"
    assert as_json(status, ["old", "--run-root", str(root)], capsys)["run_id"] == "old"
    assert [r["run_id"] for r in as_json(status, ["--all"], capsys)["runs"]] == ["new", "old"]
    with pytest.raises(UsageError, match="no run at"):
        status.main(["nowhere"])


def test_a_folder_of_the_same_name_here_does_not_hide_the_run(
    finished: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    given = ["demo", "--run-root", str(finished.run.path.parent)]
    assert as_json(status, given, capsys)["run_dir"] == str(finished.run.path)


def test_a_run_folder_that_others_may_write_is_refused(finished: RecordedRun) -> None:
    finished.run.path.chmod(0o777)
    with pytest.raises(StateError, match="chmod go-w"):
        status.main(["demo"])


def test_a_chain_that_cannot_be_read_hides_no_other_run(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = finished.run.path.parent / "theirs"
    spoilt.mkdir()
    (spoilt / "chain.yaml").write_text("{stages: [{name: sft}]}")
    shown = as_json(status, ["--all"], capsys)
    assert [run["run_id"] for run in shown["runs"]] == ["demo"]
    assert [note for note in shown["notes"] if "theirs is left out" in note]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_newest_run_is_your_own(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    root = finished.run.path.parent
    theirs = RecordedRun(root / "theirs")
    os.chown(theirs.run.path, 12345, 12345)
    chain = root / "chain"
    chain.mkdir()
    (chain / "chain.yaml").write_text("{}")
    os.chown(chain, 12345, 12345)
    assert as_json(status, [], capsys)["run_id"] == "demo"


def test_what_is_beyond_the_newest_fifty_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(52):
        RecordedRun(root / f"run-{number}")
    shown = as_json(status, ["--all"], capsys)
    assert len(shown["runs"]) == 50
    assert shown["notes"] == ["these are the newest 50 runs of 52: name one of the others to see it"]


def test_all_shows_accuracy_and_can_be_filtered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, stage, cause in (
        ("grpo-1", "rl", "finished"),
        ("grpo-2", "rl", "crash"),
        ("base", "sft", "finished"),
    ):
        made = RecordedRun(root / name, stage=stage)
        made.submit("local-1")
        made.attempt(1, 40, cause, committed=40)
        if cause == "finished":
            made.finish(made.run.finished)
    value = {"value": 0.25, "low": 0.1, "high": 0.5}
    line = {"global_step": 40, "policy": "p", "greedy": value, "pass_at": {"1": value}, "num_items": 8}
    line |= {"num_samples": 1, "response_length": 1.0}
    append_record(RunDir(root / "grpo-1").rl_evaluations, {"attempt": 1, "time": 1.0, **line})
    (root / "chain" / "grpo-3").mkdir(parents=True)
    (root / "chain" / "chain.yaml").write_text("{}")
    RecordedRun(root / "chain" / "grpo-4", stage="rl")

    def names(*argv: str) -> set[str]:
        return {run["run_id"] for run in as_json(status, ["--all", *argv], capsys)["runs"]}

    assert names() == {"grpo-1", "grpo-2", "base"}
    assert names("grpo-?") == {"grpo-1", "grpo-2"}
    assert names("--stage", "rl") == {"grpo-1", "grpo-2", "grpo-4"}, "the stages of chains too"
    assert names("--stage", "rl", "--state", "finished") == {"grpo-1"}
    assert names("chain/*") == {"grpo-4"}
    assert status.main(["--all", "*-1"]) == 0
    assert "0.250 (n=8)" in capsys.readouterr().out
    assert status.main(["--all", "nobody*"]) == 0
    assert "no runs that fit under" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--state finishd: one of queued, running"):
        status.main(["--all", "--state", "finishd"])
    with pytest.raises(UsageError, match="add --all"):
        status.main(["--stage", "rl"])
