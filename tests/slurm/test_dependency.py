"""The sbatch options of jobs that wait, and jobs found again by their folder."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.slurm.queue import after_all_ok, jobs_by_folder


@pytest.mark.parametrize(
    ("jobs", "also", "dependency"),
    [
        (["12"], None, "afterok:12"),
        (["12", "13"], None, "afterok:12:13"),
        (["12"], "afterany:7", "afterany:7,afterok:12"),
    ],
)
def test_a_job_waits_for_all_and_dies_with_any(jobs: list[str], also: str | None, dependency: str) -> None:
    assert after_all_ok(jobs, also) == {"dependency": dependency, "kill-on-invalid-dep": "yes"}


def test_a_job_that_waits_for_nobody_has_no_option() -> None:
    assert after_all_ok([]) == {}


def test_a_dependency_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--dependency"):
        after_all_ok(["12"], "$(touch x)")


def test_folders_may_hold_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nprintf '%s\\n' '12 /runs/a b' '13 /runs/c' '14 /runs/c'\n")
    squeue.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert jobs_by_folder() == {Path("/runs/a b"): ["12"], Path("/runs/c"): ["13", "14"]}
