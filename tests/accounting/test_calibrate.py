"""Which finished runs of a run root enter the correction, and whose record of their hours counts."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc.accounting import calibrate
from r1hpc.accounting.calibrate import finished_runs, resource_name
from r1hpc.accounting.correction import CPU
from r1hpc.base.files import write_json
from r1hpc.plan.hours.estimate_run import CPU_PRIOR
from r1hpc.slurm.sacct import FIELDS
from tests.recorded import EPOCH, RecordedRun


def make(
    root: Path,
    name: str,
    *,
    estimate: dict[str, Any] | None,
    seconds: int = 3600,
    gpus: int = 0,
    nodes: int = 1,
    job: str | None = None,
    start: float = EPOCH,
) -> RecordedRun:
    """A finished run of one attempt that held its nodes for about `seconds`."""
    made = RecordedRun(root / name, gpus=gpus, nodes=nodes)
    made.clock = start
    made.submit(job or "local-1", "local" if job is None else "slurm")
    made.attempt(1, 10, "finished", committed=10, step_s=(seconds - 12) / 10)
    if estimate is not None:
        store(made, estimate)
    return made


def store(made: RecordedRun, estimate: dict[str, Any]) -> None:
    """As the estimator of today made it."""
    known = {"cpu_prior": CPU_PRIOR, **estimate.get("assumptions", {})}
    write_json(made.run.path / "estimate.json", {**estimate, "assumptions": known})


def hours(p50: float) -> dict[str, float]:
    return {"p10": p50 / 1.5, "p50": p50, "p90": p50 * 1.5}


def test_node_hours_of_cpu_runs_and_gpu_hours_of_each_card(tmp_path: Path) -> None:
    make(tmp_path, "cpu", estimate={"node_hours": hours(1.0), "gpu_hours": hours(0)}, nodes=2)
    gpu = make(tmp_path, "gpu", estimate={"gpu_hours": hours(4.0), "assumptions": {"gpu": "a100"}}, gpus=8)
    gpu.gpu_ticks(gpu.clock, 5)
    site = finished_runs(tmp_path)
    assert site.resources == ["A100-SXM4-80GB", CPU]
    found = {run.run_id: run for run in site.runs}
    assert found["cpu"].hours == pytest.approx(2.0, rel=1e-3)
    assert found["gpu"].hours == pytest.approx(8.0, rel=1e-3)
    assert resource_name("NVIDIA A100-SXM4-80GB") == "A100-SXM4-80GB"
    assert resource_name("Ascend 910") == "Ascend 910"


def test_stages_of_chains_enter_under_the_name_of_their_chain(tmp_path: Path) -> None:
    for chain, seconds in (("one", 3600), ("two", 7200)):
        (tmp_path / chain).mkdir()
        (tmp_path / chain / "chain.yaml").touch()
        make(tmp_path / chain, "sft", estimate={"node_hours": hours(1.0)}, seconds=seconds)
    for _ in range(2):  # the second time from calibration.json
        found = {run.run_id: run.hours for run in finished_runs(tmp_path).runs}
        assert found == {"one/sft": pytest.approx(1.0), "two/sft": pytest.approx(2.0)}


def test_a_stored_correction_does_not_correct_itself_away(tmp_path: Path) -> None:
    """Had the ratio been taken from the corrected estimate, it would be 1 and the correction forgotten."""
    stored = {"node_hours": hours(2.0), "uncorrected": {"node_hours": hours(1.0)}}
    make(tmp_path, "run", estimate=stored, nodes=2)
    assert finished_runs(tmp_path).runs[0].estimate.p50 == 1.0


def test_what_does_not_enter_and_why(tmp_path: Path) -> None:
    make(tmp_path, "a", estimate=None)
    make(tmp_path, "b", estimate={"node_hours": {"p10": 3, "p50": 2, "p90": 1}})
    make(tmp_path, "c", estimate={"node_hours": hours(0)})
    RecordedRun(tmp_path / "d").submit("local-1")
    other = make(tmp_path, "e", estimate={"gpu_hours": hours(4.0), "assumptions": {"gpu": "h100"}}, gpus=4)
    other.gpu_ticks(other.clock, 5)
    make(tmp_path, "f", estimate={"gpu_hours": hours(4.0)}, gpus=4)
    make(tmp_path, "g", estimate={"node_hours": hours(1.0), "assumptions": {"cpu_prior": 1}})
    assert finished_runs(tmp_path).left_out == {
        "no estimate": 1,
        "an estimate that cannot be read": 1,
        "an estimate of nothing": 1,
        "not finished": 1,
        "estimated for another GPU than it ran on": 1,
        "GPU not known": 1,
        "estimated by an earlier version": 1,
    }


@pytest.mark.parametrize(
    ("estimated", "seen", "found"),
    [
        ({"gpu": "a100", "gpu_given": True}, False, "A100-SXM4-80GB"),
        ({"gpu": "A100-SXM4-80GB", "gpu_given": False}, False, "GPU not known"),
        ({"gpu": "A100-SXM4-80GB"}, False, "GPU not known"),
        ({"gpu": "A100-SXM4-80GB", "gpu_given": False}, True, "A100-SXM4-80GB"),
        ({"gpu": "a100-40gb", "gpu_given": True}, True, "estimated for another GPU than it ran on"),
        ({}, True, "A100-SXM4-80GB"),
    ],
)
def test_a_card_that_was_only_assumed_tells_nothing(
    tmp_path: Path, estimated: dict[str, Any], seen: bool, found: str
) -> None:
    made = make(tmp_path, "run", estimate={"gpu_hours": hours(4.0), "assumptions": estimated}, gpus=4)
    if seen:
        made.gpu_ticks(made.clock, 5)
    site = finished_runs(tmp_path)
    assert [*site.resources, *site.left_out] == [found]


def test_what_is_kept_is_used_until_the_run_or_its_estimate_changes(tmp_path: Path) -> None:
    made = make(tmp_path, "run", estimate={"node_hours": hours(1.0)})
    first = finished_runs(tmp_path)
    made.run.attempts.unlink()
    assert finished_runs(tmp_path) == first, "attempts.jsonl is not read again"
    store(made, {"node_hours": hours(2.0)})
    assert finished_runs(tmp_path).left_out == {"no time on record": 1}
    damaged = {
        "version": calibrate._VERSION,
        "runs": {"run": 3, "other": {"mark": [], "run": {"estimate": 1}}},
    }
    for text in ("not ours", json.dumps(damaged)):
        (tmp_path / "calibration.json").write_text(text)
        assert finished_runs(tmp_path).left_out == {"no time on record": 1}


def test_a_run_root_that_cannot_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "run", estimate={"node_hours": hours(1.0)})
    (tmp_path / "calibration.json").mkdir()
    assert len(finished_runs(tmp_path).runs) == 1


def fake_sacct(folder: Path, *lines: str) -> None:
    """A sacct that prints `lines` and counts how often it was asked."""
    folder.mkdir(exist_ok=True)
    script = folder / "sacct"
    body = "\n".join(["#!/bin/sh", f"echo asked >> {folder}/calls", "cat <<'END'", *lines, "END", ""])
    script.write_text(body)
    script.chmod(0o755)


def line(
    job: str, seconds: int, end: str = "1790003600", state: str = "COMPLETED", start: float = EPOCH
) -> str:
    known = {
        "JobID": job,
        "State": state,
        "Start": f"{start:.0f}",
        "End": end,
        "ElapsedRaw": str(seconds),
        "AllocTRES": "cpu=4,node=2",
        "NNodes": "2",
        "JobName": "a|b",
    }
    return "|".join(known.get(field, "") for field in FIELDS.split(","))


def test_slurms_account_of_all_attempts_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    root, began = tmp_path / "runs", round(time.time()) - 7200.0
    for job in ("11", "12"):
        make(root, f"run{job}", estimate={"node_hours": hours(1.0)}, nodes=2, job=job, start=began)
    fake_sacct(
        tmp_path / "bin",
        line("11", 1800, state="PREEMPTED", start=began - 2000),
        line("11", 3600, start=began),
        line("12", 60, "Unknown", "RUNNING", start=began),
    )
    for _ in range(2):
        found = {run.run_id: (run.hours, run.source) for run in finished_runs(root).runs}
        # Of run12 Slurm does not know the end yet: it lasted at least until the run itself ended.
        assert found == {"run11": (3.0, "sacct"), "run12": (pytest.approx(2 * 3605 / 3600), "sacct")}
    assert (tmp_path / "bin" / "calls").read_text().count("asked") == 2, "one call for all that is not final"
    fake_sacct(tmp_path / "bin", line("12", 7200, start=began))
    assert {run.hours for run in finished_runs(root).runs} == {3.0, 4.0}


def test_where_sacct_does_not_answer_the_runs_own_record_counts_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    began = round(time.time()) - 7200.0
    make(tmp_path / "runs", "run", estimate={"node_hours": hours(1.0)}, nodes=2, job="11", start=began)
    fake_sacct(tmp_path / "bin")
    (run,) = finished_runs(tmp_path / "runs").runs
    assert run.source == "run"
    assert run.hours == pytest.approx(2.0, rel=1e-3)
    fake_sacct(tmp_path / "bin", line("11", 7200, start=began))
    assert finished_runs(tmp_path / "runs").runs[0].source == "sacct"
