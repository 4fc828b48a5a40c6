"""Run folders that cannot be read are left out in words by every command that reads many of them."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from r1hpc import budget, calibrate, report, status
from r1hpc.accounting.budget import RunRequest
from r1hpc.accounting.budget_status import check_submission
from r1hpc.accounting.open_ledger import open_ledger, survey
from r1hpc.base.errors import StateError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.plan.hours.spread import Spread
from tests.recorded import RecordedRun


def made_in(root: Path, name: str) -> RecordedRun:
    made = RecordedRun(root / name, gpus=8)
    made.submit("local-1")
    made.attempt(1, 20, "finished", committed=20)
    plan = {"p10": 0.01, "p50": 0.02, "p90": 0.04}
    write_json(
        made.run.path / "estimate.json",
        {"gpu_hours": plan, "assumptions": {"gpu": "a100", "gpu_given": True}},
    )
    return made


def _rubbish_attempts(run: RunDir) -> None:
    run.attempts.write_bytes(os.urandom(300).replace(b"\n", b"x") + b"\n" + b"nothing of ours\n")


def _no_attempts_file(run: RunDir) -> None:
    run.attempts.unlink()
    run.attempts.mkdir()


def _no_config(run: RunDir) -> None:
    run.config.unlink()


def _values_of_another_kind(run: RunDir) -> None:
    lines = []
    for name in ("begin", "end"):
        event: dict[str, object] = {"event": name, "time": "noon", "attempt": {}}
        lines.append(json.dumps(event) + "\n")
    run.attempts.write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)
    root = tmp_path / "runs"
    made_in(root, "good")
    (root / "budget.yaml").write_text("gpu_hours: 100\n")
    return root


@pytest.mark.parametrize("spoil", [_rubbish_attempts, _no_attempts_file, _no_config, _values_of_another_kind])
def test_a_damaged_run_is_left_out_in_words(
    root: Path, spoil: Callable[[RunDir], None], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--run-root", str(root)]
    assert budget.main([*where, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    bad = made_in(root, "bad").run
    spoil(bad)

    assert budget.main([*where, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["spent"] == before["spent"] > 0
    assert any("bad is left out" in note for note in after["notes"])
    warned = check_submission(root, [RunRequest(Spread(1, 2, 3))], ask_slurm=False)
    assert warned.allowed
    assert any("bad is left out" in warning for warning in warned.warnings)
    assert status.main([*where, "--all", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [run["run_id"] for run in shown["runs"]] == ["good"]
    assert any("bad is left out" in note for note in shown["notes"])
    assert status.main([*where, "--all"]) == 0
    assert "bad is left out" in " ".join(capsys.readouterr().out.split())
    assert report.main([*where, "--format", "html"]) == 0
    assert "bad is left out" in (root / "report.html").read_text()
    assert report.main([*where, "--start", "2026-01-01"]) == 0
    assert "bad is left out" in " ".join(capsys.readouterr().out.split())
    assert calibrate.main([*where, "--json"]) == 0
    site = json.loads(capsys.readouterr().out)
    assert (site["num_runs"], site["left_out"]) == (1, {"damaged": 1})


def test_a_spoilt_plan_or_estimate_is_named_and_the_hours_count(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = made_in(root, "bad").run
    assert budget.main(["--run-root", str(root), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    bad.plan.mkdir()
    bad.estimate.write_text('{"gpu_hours": {"p10": "some"}}')
    assert budget.main(["--run-root", str(root), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["spent"] == before["spent"] > 0
    said = " ".join(after["notes"])
    assert f"{bad.plan} is not a plain file" in said
    assert f"{bad.estimate}: gpu_hours.p10 is 'some', not a number" in said


def test_one_that_is_asked_for_by_name_is_refused_in_a_line(root: Path) -> None:
    bad = made_in(root, "bad").run
    _rubbish_attempts(bad)
    for command in (status, report):
        with pytest.raises(
            StateError, match=r"attempts.jsonl: line 1, 2 cannot be read.*restore it or remove"
        ):
            command.main([str(bad.path)])


@pytest.fixture
def shared_root() -> Iterator[Path]:
    """A run root that everybody may read and nobody but its owner may write."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        for name in ("good", "bad"):
            made_in(root, name)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield root


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may do everything: it takes the rights of another user; any other user takes its own away."""
    if os.getuid():
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_left_out(shared_root: Path) -> None:
    (shared_root / "bad").chmod(0o700)
    with as_somebody_else():
        runs, notes = survey(shared_root, 0.0)
    assert [run.run_id for run in runs] == ["good"]
    assert [note for note in notes if "bad is left out: Permission denied" in note]


def test_a_colleagues_runs_are_read_and_nothing_is_written(shared_root: Path) -> None:
    with as_somebody_else():
        first, notes = survey(shared_root, 0.0)
        again, _ = survey(shared_root, 0.0)
    assert notes == []
    assert [run.used for run in first] == [run.used for run in again]
    assert list(shared_root.glob("*/summary.json")) == []


def test_a_garbled_line_in_the_middle_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_in(root, "bad")
    lines = made.run.attempts.read_text().splitlines(keepends=True)
    made.run.attempts.write_text("".join([lines[0], '{"event": "end", "att\n', *lines[1:]]))
    (note,) = open_ledger(made.run, 0.0).notes
    assert "attempts.jsonl: line 2 cannot be read and is left out" in note
    assert [run.run_id for run in survey(root, 0.0)[0]] == ["bad", "good"]
    for command, *argv in (
        (budget, "--run-root", str(root)),
        (status, str(made.run.path)),
        (report, str(made.run.path)),
    ):
        assert command.main(argv) == 0
        assert "line 2 cannot be read and is left out" in " ".join(capsys.readouterr().out.split())


def test_rubbish_among_the_steps_is_said_and_the_hours_stay(root: Path) -> None:
    made = made_in(root, "bad")
    clean = open_ledger(made.run, 0.0)
    whole = made.run.train_metrics.read_bytes()
    made.run.train_metrics.write_bytes(whole[:700] + os.urandom(200).replace(b"\n", b"x") + whole[700:])
    damaged = open_ledger(made.run, 0.0)
    assert damaged.used == clean.used
    assert damaged.parts["useful"] < clean.parts["useful"]
    assert "1 lines of" in damaged.notes[0]
    assert "hold no step" in damaged.notes[0]


def test_a_line_that_is_being_written_is_no_damage(root: Path) -> None:
    made = made_in(root, "bad")
    with made.run.attempts.open("a") as file:
        file.write('{"event": "begi')
    assert open_ledger(made.run, 0.0).notes == ()
