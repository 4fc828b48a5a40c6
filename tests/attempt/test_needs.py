"""A stage of a chain begins when what it needs is finished, and not before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.attempt.begin import begin, is_stage, unmet, write_needs
from r1hpc.attempt.may_begin import MustNotGoOnError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.telemetry.records.attempts import read_history
from tests.recorded import RecordedRun

_PATIENT = ("limits.max_crashes=-1", "limits.max_attempts_without_checkpoint=9")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A stage of a chain that reads no data, beside two that it needs."""
    for name in ("sft", "grpo", "evaluate"):
        made = RunDir(tmp_path / name)
        made.create()
        load.save(load.load(None, ["stage=traces", *_PATIENT]), made.config)
    write_needs(made, ["sft", "grpo"])
    return made


def test_a_stage_waits_for_what_it_needs(run: RunDir, tmp_path: Path) -> None:
    assert unmet(run) == ["sft", "grpo"]
    (tmp_path / "sft" / "FINISHED").touch()
    assert unmet(run) == ["grpo"]
    with pytest.raises(MustNotGoOnError, match="evaluate does not begin: it needs grpo, not finished yet"):
        begin(run, "slurm", "7", ("n1",), 1)
    assert not read_history(run).attempts
    (tmp_path / "grpo" / "FINISHED").touch()
    assert unmet(run) == []
    assert begin(run, "slurm", "7", ("n1",), 1) == 1


def test_a_run_that_is_gone_is_not_finished(run: RunDir, tmp_path: Path) -> None:
    write_needs(run, ["nowhere"])
    assert unmet(run) == ["nowhere"]


def test_an_ordinary_run_needs_nothing(tmp_path: Path) -> None:
    alone = RunDir(tmp_path / "alone")
    alone.create()
    assert not is_stage(alone)
    assert unmet(alone) == []


@pytest.mark.timeout(30)  # it leaves at once: one that is on its way out is waited for, for 45 s
def test_a_second_job_of_a_run_at_work_leaves(run: RunDir, tmp_path: Path) -> None:
    write_needs(run, [])
    first = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(run.path)])
    try:
        assert begin(run, "local", f"local-{first.pid}", ("n1",), 1) == 1
        with pytest.raises(MustNotGoOnError, match=f"already running as job local-{first.pid} in attempt 1"):
            begin(run, "local", "local-1", ("n1",), 1)
        assert begin(run, "local", f"local-{first.pid}", ("n1",), 1) == 2  # the same job, started again
    finally:
        first.kill()
        first.wait()
    assert begin(run, "local", "local-1", ("n1",), 1) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount something that is in the way")
def test_a_conversion_that_cannot_be_removed_does_not_hinder(run: RunDir) -> None:
    """As where the process that converts outlives its rank and writes on: then the folder is never empty."""
    write_needs(run, [])
    busy = run.path / "universal-1" / "busy"
    busy.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(busy)], check=True)
    try:
        assert begin(run, "slurm", "7", ("n1",), 1) == 1
    finally:
        subprocess.run(["umount", str(busy)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_users_file_deep_in_the_frozen_code_does_not_run(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "demo").run
    file = run.code / "r1hpc" / "base" / "deep.py"
    file.parent.mkdir(parents=True)
    file.touch()
    os.chown(file, 4711, -1)
    with pytest.raises(MustNotGoOnError, match=f"{file} belongs to uid 4711"):
        begin(run, "local", "local-1", ("n1",), 1)
