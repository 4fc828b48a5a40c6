"""calibrate: the estimates beside what runs took."""

import json
import time
from pathlib import Path

import pytest

from r1hpc import calibrate as command
from r1hpc.accounting.correction import (
    CPU,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.plan.hours.estimate_run import CPU_PRIOR
from tests.recorded import RecordedRun


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        made = RecordedRun(tmp_path / f"run{i}")
        made.submit("local-1")
        made.attempt(1, 10, "finished", committed=10, step_s=720 + 10 * i)
        node_hours = {"p10": 1 / 1.5, "p50": 1.0, "p90": 1.5}
        estimate = {"node_hours": node_hours, "assumptions": {"cpu_prior": CPU_PRIOR}}
        write_json(made.run.estimate, estimate)
        made.run.finished.write_text("{}")
        time.sleep(0.01)
    argv = ["--run-root", str(tmp_path)]
    assert command.main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["resources"][CPU]
    factor = answer["correction"]["factor_p50"]
    assert 1.85 < factor < 2.07, "nearly what all six took, a little less by the prior"
    shown = answer["effect"]
    assert shown["before"]["median_error"] > 5 * shown["after"]["median_error"]
    assert [run["run_id"] for run in answer["runs"]] == [f"run{i}" for i in range(6)]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert f"Next estimate: x {factor:.2f}" in text
    assert "6 finished runs, none left out" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(UsageError, match="--run-root"):
        command.main(["--run-root", str(tmp_path / "nowhere")])
