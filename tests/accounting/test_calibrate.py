"""The site's own ratios in place of the prior: the arithmetic, then run folders, then a cluster."""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc import calibrate as command
from r1hpc.accounting.calibrate import finished_runs, resource_name, site_correction
from r1hpc.accounting.correction import (
    CPU,
    MOST_RUNS,
    REPLACES_AT,
    FinishedRun,
    correction,
    effect,
    score,
)
from r1hpc.accounting.forecast import Spread
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.slurm.sacct import FIELDS
from tests.recorded import RecordedRun

PRIOR = Spread(70.0, 100.0, 150.0)


def finished(ratio: float, resource: str = CPU, at: float = 0.0, estimate: Spread = PRIOR) -> FinishedRun:
    return FinishedRun(f"r{at:g}", resource, at, estimate, ratio * estimate.p50, "run")


def runs(*ratios: float) -> list[FinishedRun]:
    return [finished(ratio, at=i) for i, ratio in enumerate(ratios)]


def test_without_a_run_the_estimate_stays() -> None:
    nothing = correction(CPU, [])
    assert nothing.apply(PRIOR) == PRIOR
    assert "no finished run on cpu yet" in nothing.basis


def test_from_five_runs_on_their_ratios_are_all_there_is() -> None:
    own = correction(CPU, runs(1.9, 2.0, 2.1, 2.0, 2.05))
    assert (own.num_runs, own.weight) == (REPLACES_AT, 1.0)
    assert own.factor_p50 == pytest.approx(2.0)
    corrected = own.apply(Spread(1.0, 100.0, 9999.0))
    assert corrected.p50 == pytest.approx(200)
    assert 150 < corrected.p10 < 190 < 210 < corrected.p90 < 260, "the prior's own width is gone"
    assert "in place of the published prior" in own.basis


def test_before_that_the_prior_keeps_a_part_that_shrinks() -> None:
    weights = [correction(CPU, runs(*[2.0] * n)).weight for n in range(1, 6)]
    assert weights == sorted(weights)
    assert 0.5 < weights[0] < weights[3] < 1 == weights[4]
    one = correction(CPU, runs(2.0)).apply(PRIOR)
    assert 100 < one.p50 < 200
    assert 70 < one.p10 < one.p50 < one.p90


def test_a_sure_prior_gives_way_more_slowly_than_an_unsure_one() -> None:
    sure, unsure = (Spread(100 / f, 100, 100 * f) for f in (1.1, 3.0))
    weights = [correction(CPU, [finished(2.0, estimate=prior)]).weight for prior in (sure, unsure)]
    assert weights[0] < 0.5 < 0.9 < weights[1]


def test_one_odd_run_does_not_move_the_factor_but_widens_it() -> None:
    calm, odd = correction(CPU, runs(*[2.0] * 5)), correction(CPU, runs(2.0, 2.0, 2.0, 2.0, 20.0))
    assert odd.factor_p50 == calm.factor_p50
    assert odd.factor_p90 > 2 * calm.factor_p90


def test_only_the_newest_runs_count() -> None:
    moved = correction(CPU, runs(*[9.0] * MOST_RUNS, *[1.5] * MOST_RUNS))
    assert moved.num_runs == MOST_RUNS
    assert moved.factor_p50 == pytest.approx(1.5)


@pytest.mark.parametrize("spread", [0.05, 0.3])
@pytest.mark.parametrize("num", [5, 12])
def test_the_interval_holds_the_next_run_four_times_out_of_five(num: int, spread: float) -> None:
    """On sites whose bias and spread are drawn at random; a spread of 0.05 is below what is assumed."""
    dice = random.Random(1)
    inside = 0
    for _ in range(1500):
        bias = dice.gauss(0, 0.5)
        ratios = [math.exp(bias + dice.gauss(0, spread)) for _ in range(num + 1)]
        next_run = correction(CPU, runs(*ratios[:-1])).apply(PRIOR)
        inside += next_run.p10 <= 100 * ratios[-1] <= next_run.p90
    assert 0.76 <= inside / 1500 <= (0.99 if spread < 0.1 else 0.86)


def test_each_run_is_judged_by_the_runs_before_it_alone() -> None:
    scored = score(runs(2.0, 2.0, 2.0, 2.0, 2.0, 2.0))
    assert scored[0].error_after == scored[0].error_before == 0.5
    afters = [each.error_after for each in scored]
    assert afters == sorted(afters, reverse=True)
    assert afters[-1] == pytest.approx(0)
    assert effect(scored[:1]) is None
    shown = effect(scored)
    assert shown is not None
    assert (shown.num_runs, shown.before.num_inside, shown.after.num_inside) == (5, 0, 5)
    assert shown.before.median_error == 0.5 > 0.2 > shown.after.median_error
    assert shown.before.median_width > shown.after.median_width


# Run folders


def make(
    root: Path,
    name: str,
    *,
    estimate: dict[str, Any] | None,
    seconds: int = 3600,
    gpus: int = 0,
    nodes: int = 1,
    job: str | None = None,
) -> RecordedRun:
    """A finished run of one attempt that held its nodes for about `seconds`."""
    made = RecordedRun(root / name, gpus=gpus, nodes=nodes)
    made.submit(job or "local-1", "local" if job is None else "slurm")
    made.attempt(1, 10, "finished", committed=10, step_s=(seconds - 12) / 10)
    if estimate is not None:
        write_json(made.run.path / "estimate.json", estimate)
    return made


def hours(p50: float) -> dict[str, float]:
    return {"p10": p50 / 1.5, "p50": p50, "p90": p50 * 1.5}


def test_node_hours_of_cpu_runs_and_gpu_hours_of_each_card(tmp_path: Path) -> None:
    make(tmp_path, "cpu", estimate={"node_hours": hours(1.0), "gpu_hours": hours(0)}, nodes=2)
    gpu = make(tmp_path, "gpu", estimate={"gpu_hours": hours(4.0), "assumptions": {"gpu": "a100"}}, gpus=8)
    gpu.gpu_ticks(gpu.clock, 5)
    site = finished_runs(tmp_path)
    assert site.resources == ["A100-SXM4-80GB", CPU]
    found = {run.run_id: run for run in site.runs}
    assert found["cpu"].actual == pytest.approx(2.0, rel=1e-3)
    assert found["gpu"].actual == pytest.approx(8.0, rel=1e-3)
    assert site_correction(tmp_path, "NVIDIA A100-SXM4-80GB").num_runs == 1
    assert site_correction(tmp_path, "h100").num_runs == 0
    assert resource_name("Ascend 910") == "Ascend 910"


def test_stages_of_chains_enter_under_the_name_of_their_chain(tmp_path: Path) -> None:
    for chain, seconds in (("one", 3600), ("two", 7200)):
        (tmp_path / chain).mkdir()
        (tmp_path / chain / "chain.yaml").touch()
        make(tmp_path / chain, "sft", estimate={"node_hours": hours(1.0)}, seconds=seconds)
    for _ in range(2):  # the second time from calibration.json
        found = {run.run_id: run.actual for run in finished_runs(tmp_path).runs}
        assert found == {"one/sft": pytest.approx(1.0), "two/sft": pytest.approx(2.0)}


def test_a_stored_correction_does_not_correct_itself_away(tmp_path: Path) -> None:
    """Had the ratio been taken from the corrected estimate, it would be 1 and the correction forgotten."""
    stored = {"node_hours": hours(2.0), "uncorrected": {"node_hours": hours(1.0)}}
    make(tmp_path, "run", estimate=stored, nodes=2)
    assert finished_runs(tmp_path).runs[0].estimate.p50 == 1.0


@pytest.mark.parametrize("place", ["first", "later"])
def test_a_run_fed_by_the_stub_never_enters(tmp_path: Path, place: str) -> None:
    made = make(tmp_path, "run", estimate={"gpu_hours": hours(4.0)}, gpus=4)
    made.gpu_ticks(made.clock, 5, source="stub" if place == "first" else "nvml")
    made.gpu_ticks(made.clock + 60, 5, source="stub")
    site = finished_runs(tmp_path)
    assert site.runs == ()
    assert site.left_out == {"GPU readings from the stub library": 1}
    assert finished_runs(tmp_path) == site, "and is not let in by what was kept of the first look"


def test_what_does_not_enter_and_why(tmp_path: Path) -> None:
    make(tmp_path, "a", estimate=None)
    make(tmp_path, "b", estimate={"node_hours": {"p10": 3, "p50": 2, "p90": 1}})
    make(tmp_path, "c", estimate={"node_hours": hours(0)})
    RecordedRun(tmp_path / "d").submit("local-1")
    other = make(tmp_path, "e", estimate={"gpu_hours": hours(4.0), "assumptions": {"gpu": "h100"}}, gpus=4)
    other.gpu_ticks(other.clock, 5)
    make(tmp_path, "f", estimate={"gpu_hours": hours(4.0)}, gpus=4)
    assert finished_runs(tmp_path).left_out == {
        "no estimate": 1,
        "an estimate that cannot be read": 1,
        "an estimate of nothing": 1,
        "not finished": 1,
        "estimated for another GPU than it ran on": 1,
        "GPU not known": 1,
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
    write_json(made.run.path / "estimate.json", {"node_hours": hours(2.0)})
    assert finished_runs(tmp_path).left_out == {"no time on record": 1}
    spoilt = {"version": 3, "runs": {"run": 3, "other": {"mark": [], "run": {"estimate": 1}}}}
    for text in ("not ours", json.dumps(spoilt)):
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


def line(job: str, seconds: int, end: str = "1790003600", state: str = "COMPLETED") -> str:
    known = {
        "JobID": job,
        "State": state,
        "Start": "1790000000",
        "End": end,
        "ElapsedRaw": str(seconds),
        "AllocTRES": "cpu=4,node=2",
        "NNodes": "2",
        "JobName": "a|b",
    }
    return "|".join(known.get(field, "") for field in FIELDS.split(","))


def test_slurms_account_of_all_attempts_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    root = tmp_path / "runs"
    for job in ("11", "12"):
        make(root, f"run{job}", estimate={"node_hours": hours(1.0)}, nodes=2, job=job)
    fake_sacct(
        tmp_path / "bin", line("11", 1800, state="PREEMPTED"), line("11", 3600), line("12", 60, "Unknown")
    )
    for _ in range(2):
        found = {run.run_id: (run.actual, run.source) for run in finished_runs(root).runs}
        assert found == {"run11": (3.0, "sacct"), "run12": (2 * 60 / 3600, "sacct")}
    assert (tmp_path / "bin" / "calls").read_text().count("asked") == 2, "one call for all that is not final"
    fake_sacct(tmp_path / "bin", line("12", 7200))
    assert {run.actual for run in finished_runs(root).runs} == {3.0, 4.0}


def test_where_sacct_does_not_answer_the_runs_own_record_counts_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    make(tmp_path / "runs", "run", estimate={"node_hours": hours(1.0)}, nodes=2, job="11")
    fake_sacct(tmp_path / "bin")
    (run,) = finished_runs(tmp_path / "runs").runs
    assert run.source == "run"
    assert run.actual == pytest.approx(2.0, rel=1e-3)
    fake_sacct(tmp_path / "bin", line("11", 7200))
    assert finished_runs(tmp_path / "runs").runs[0].source == "sacct"


def test_sacct_counts_only_where_it_knows_the_job_of_every_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job's record was purged; of two hours sacct would tell the second one."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    made = RecordedRun(tmp_path / "runs" / "run", nodes=1)
    for job, first, last, cause in (("11", 1, 20, "preempted"), ("12", 21, 40, "finished")):
        made.submit(job, "slurm")
        made.attempt(first, last, cause, committed=last, step_s=(3600 - 12) / 20)
    write_json(made.run.path / "estimate.json", {"node_hours": hours(1.0)})
    fake_sacct(tmp_path / "bin", line("12", 3600))
    (run,) = finished_runs(tmp_path / "runs").runs
    assert run.actual == pytest.approx(2.0, rel=1e-3)
    assert run.source == "run"
    fake_sacct(tmp_path / "bin", line("11", 3600), line("12", 3600))
    (run,) = finished_runs(tmp_path / "runs").runs
    assert (run.actual, run.source) == (4.0, "sacct"), "the answer of want was not kept; 2 nodes by sacct"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        made = make(tmp_path, f"run{i}", estimate={"node_hours": hours(1.0)}, seconds=7200 + 100 * i)
        made.run.finished.touch()
        time.sleep(0.01)
    argv = ["--run-root", str(tmp_path)]
    assert command.main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["resources"][CPU]
    assert answer["correction"]["factor_p50"] == pytest.approx(2.07, rel=0.01)
    shown = answer["effect"]
    assert shown["before"]["median_error"] > 5 * shown["after"]["median_error"]
    assert [run["run_id"] for run in answer["runs"]] == [f"run{i}" for i in range(6)]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert "Next estimate: x 2.07" in text
    assert "6 finished runs, none left out" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(UsageError, match="--run-root"):
        command.main(["--run-root", str(tmp_path / "nowhere")])
