"""budget: what is left, in words and as JSON."""

import json
import time
from pathlib import Path

import pytest

from r1hpc import budget as command
from r1hpc.base.errors import UsageError
from tests.accounting.history import DAY, make_history


def budget_file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "budget.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group's run root, in a place without Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)
    return make_history(tmp_path / "runs", time.time())


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = time.strftime("%Y-%m-%d", time.localtime(time.time() - 60 * DAY))
    budget_file(root, f"gpu_hours: 9000\nstart: {first}\ncampaign: hundred_days\n")
    assert command.main(["--run-root", str(root), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["left"] == pytest.approx(9000 - answer["spent"])
    assert answer["running"]["jobs"] == answer["queued"]["jobs"] == 1
    assert answer["running"]["p10"] < answer["running"]["p50"] < answer["running"]["p90"]
    assert [stage["days"] for stage in answer["campaign"]["stages"]] == [7, 15, 25, 40, 13]
    assert command.main(["--run-root", str(root)]) == 0
    text = capsys.readouterr().out
    for words in (
        "Budget of the runs",
        "spent",
        "P10 to P90",
        "Campaign a hundred days",
        "exceed the budget",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_command_without_a_budget_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["--run-root", str(tmp_path)]) == 0
    assert "No budget is set: give gpu_hours in" in " ".join(capsys.readouterr().out.split())
    assert command.main(["--run-root", str(tmp_path / "nosuch")]) == 0
    assert "so no run is counted" in " ".join(capsys.readouterr().out.split())


def test_the_command_says_that_it_could_not_count_an_account(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget_file(root, "gpu_hours: 9000\naccount: lab\n")
    assert command.main(["--run-root", str(root)]) == 0
    assert "not of all jobs of account lab" in " ".join(capsys.readouterr().out.split())


def test_shards_and_rows_set_aside_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sacct and squeue, as they print a job on shards, a torn row, and a queued job on shards."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    times = f"{int(time.time()) - 7200}|{int(time.time()) - 3600}|3600"
    header = "JobID|State|Start|End|ElapsedRaw|AllocTRES|User|Account|Cluster|JobName"
    rows = f"1|COMPLETED|{times}|billing=24,gres/shard=8|ada|lab|one|a\\ntorn"
    rows += f"\\n3|COMPLETED|{times}|billing=12,gres/gpu=1|ada|lab|one|a"
    answers = {
        "sacct": f"printf '{header}\\n{rows}\\n'",
        "squeue": "echo '2|PENDING|cpu=2,node=1,gres/shard=4|2:00:00|0:00|'",
        "scontrol": "exit 1",
        "sacctmgr": "exit 1",
    }
    for name, script in answers.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o700)
    path = budget_file(tmp_path / "runs", "gpu_hours: 9000\naccount: lab\n")
    arguments = ["--run-root", str(tmp_path / "runs")]
    assert command.main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "by sacct; billed 36.00 TRES-hours" in text
    assert "1 row is set aside and not counted: sacct:3 has 1 fields" in text
    assert f"gres/shard count as no GPU: tell how many make one with {path}: gres_per_gpu: shard=N" in text

    def spent_and_queued(*more: str) -> list[float]:
        assert command.main([*arguments, "--json", *more]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert not any("gres/" in note for note in answer["notes"])
        assert answer["billing_hours"] == 36
        return [answer["spent"], round(answer["queued"]["p90"], 1)]

    assert spent_and_queued("--gres-per-gpu", "shard=4") == [3, 1.8]
    budget_file(tmp_path / "runs", "gpu_hours: 9000\naccount: lab\ngres_per_gpu: shard=8\n")
    assert spent_and_queued() == [2, 0.9]
    budget_file(tmp_path / "runs", "gpu_hours: 9000\naccount: lab\ngres_per_gpu: shards=8\n")
    with pytest.raises(UsageError, match="gres_per_gpu shards=8: write it as shard=4"):
        command.main(arguments)
    budget_file(tmp_path / "runs", "gpu_hours: 9000\n")
    with pytest.raises(UsageError, match="needs an account's budget"):
        command.main([*arguments, "--gres-per-gpu", "shard=4"])


def test_the_exit_status_is_1_once_more_than_the_budget_is_spent(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget_file(root, "gpu_hours: 9000\n")
    assert command.main(["--run-root", str(root), "--json"]) == 0
    spent = json.loads(capsys.readouterr().out)["spent"]
    budget_file(root, f"gpu_hours: {spent / 4.34}\n")
    assert command.main(["--run-root", str(root)]) == 1
    assert "434 % are spent" in capsys.readouterr().out


def test_a_user_over_the_quota_is_named_and_the_exit_status_is_1(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget_file(root, "users: {nobody: 10}\n")
    assert command.main(["--run-root", str(root), "--json"]) == 0
    (user, spent), *_ = json.loads(capsys.readouterr().out)["by_user"].items()
    budget_file(root, f"users: {{nobody: 10, {user}: {spent / 0.96}}}\n")
    assert command.main(["--run-root", str(root)]) == 0
    assert "96 % of the quota" in capsys.readouterr().out
    budget_file(root, f"gpu_hours: {9 * spent}\nusers: {{nobody: 10, {user}: {spent / 2}}}\n")
    assert command.main(["--run-root", str(root)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"! {user} has spent " in text
    assert "200 % of the quota" in text
    assert "nobody" not in text
