"""diagnose: the newest attempt unless another is asked for."""

import json
from pathlib import Path

import pytest

from r1hpc import diagnose as command
from r1hpc.base.errors import UsageError
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.recorded import RecordedRun


def test_a_finding_for_a_person_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(tmp_path / "run", gpus=4, nodes=2)
    made.begin()
    writer = MetricWriter(made.run, 1)
    for step in range(1, 31):
        made.clock += 1
        writer.step(global_step=step, time=made.clock, loss=2.0, mfu=0.4, step_time_s=1.0, data_time_s=0.4)
    made.end("preempted")
    path = str(made.run.path)
    assert command.main([path]) == 0
    text = capsys.readouterr().out
    assert "warning: input_bound:" in text
    assert max(map(len, text.splitlines())) <= 100
    assert command.main([path, "--attempt", "1", "--quick", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in answer["findings"]] == ["input_bound"]
    assert answer["figures"]["num_steps"] == 30
    with pytest.raises(UsageError, match="no attempt 7; it has had 1"):
        command.main([path, "--attempt", "7"])


def test_a_cause_that_accounting_corrects_is_the_corrected_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watchdog called it a hang. sacct knows that the node was lost."""
    made = RecordedRun(tmp_path / "run")
    made.submit("7", "slurm")
    start = made.clock
    made.attempt(1, 20, "hang", committed=20)
    assert command.main([str(made.run.path), "--json"]) == 0
    assert "hang" in [finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    made.accounted("NODE_FAIL", start)
    assert command.main([str(made.run.path), "--json"]) == 0
    assert "hang" not in [finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]]


def test_a_run_that_never_began_has_nothing_to_diagnose(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "run")
    with pytest.raises(UsageError, match="begun no attempt"):
        command.main([str(made.run.path)])
