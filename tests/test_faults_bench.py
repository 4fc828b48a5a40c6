"""benchmarks/faults counts what a disturbed job lost, and prints it as a table."""

from pathlib import Path

import torch

from benchmarks.faults.arms import LEGEND, Job
from benchmarks.faults.jobs.small import STEPS
from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.table import measured, table


def job_with(folder: Path, steps: list[int], weight: float | None) -> Job:
    """Return a job that took these steps; a finished one has weights, beside a twin whose weight is 1."""
    twin = folder / "twins" / "r1hpc" / "log"
    twin.mkdir(parents=True)
    torch.save({"weight": torch.ones(1)}, twin / "weights.pt")
    log = folder / "log"
    log.mkdir()
    (log / "steps").write_text("\n".join(map(str, steps)))
    if weight is not None:
        torch.save({"weight": torch.full((1,), weight)}, log / "weights.pt")
    return Job("r1hpc", folder, log, 26)


def test_a_job_that_went_on_lost_the_steps_it_repeated(tmp_path: Path) -> None:
    job = job_with(tmp_path, [*range(1, 27), *range(21, STEPS + 1)], 1.5)
    row = measured(job, "preempted", ["preempted by Slurm"], tmp_path)
    assert (row["dead"], row["lost"], row["repeated"], row["false_causes"]) == (False, 6, 6, 0)
    assert row["difference"] == 0.5


def test_a_finished_job_that_left_out_steps_lost_them(tmp_path: Path) -> None:
    job = job_with(tmp_path, [*range(1, 21), *range(24, STEPS + 1)], 1.0)
    row = measured(job, "preempted", [], tmp_path)
    assert (row["dead"], row["lost"], row["repeated"], row["difference"]) == (False, 3, 0, 0.0)


def test_a_dead_job_lost_the_steps_after_its_last_save(tmp_path: Path) -> None:
    row = measured(job_with(tmp_path, [*range(1, 27)], None), "crash", [], tmp_path)
    assert (row["dead"], row["lost"], row["repeated"]) == (True, 6, 0)
    assert row["false_causes"] is row["difference"] is None  # nothing was stated, nothing can be compared


def test_a_cause_that_did_not_happen_is_false(tmp_path: Path) -> None:
    job = job_with(tmp_path, [*range(1, STEPS + 1)], 1.0)
    assert measured(job, FAULTS["node"].true, ["node_fail", "crash"], tmp_path)["false_causes"] == 1
    assert measured(job, FAULTS["controller"].true, ["crash"], tmp_path)["false_causes"] == 1


def test_the_table_has_a_line_for_each_arm_and_its_seeds_side_by_side() -> None:
    row = {"fault": "kill", "arm": "plain", "dead": True, "lost": 6, "repeated": 0, "false_causes": None}
    rows = [row | {"difference": None}, row | {"dead": False, "repeated": 6, "difference": 0.1234}]
    lines = table([*rows, rows[1] | {"arm": "r1hpc", "false_causes": 0}]).splitlines()
    assert lines[2] == f"| SIGKILL of the rank | {LEGEND['plain']} | 1 of 2 | 6, 6 | 0, 6 | -, - | -, 0.12 |"
    assert lines[3] == f"| SIGKILL of the rank | {LEGEND['r1hpc']} | 0 of 1 | 6 | 6 | 0 | 0.12 |"
    assert len(lines) == 7
