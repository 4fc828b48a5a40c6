"""What a site's own runs say of the next estimate: the arithmetic, then run folders, then the command."""

import json
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc import estimate as estimate_command
from r1hpc.accounting.calibrate import finished_runs, resource_name
from r1hpc.accounting.correction import (
    CPU,
    MOST_RUNS,
    RUN_SPREAD,
    FinishedRun,
    Planned,
    correction,
    effect,
    score,
)
from r1hpc.accounting.forecast import Spread
from r1hpc.base.files import write_json
from r1hpc.config.load import load
from r1hpc.estimator.cpu import CPU_PRIOR
from r1hpc.plan.run import make_plan
from r1hpc.slurm.sacct import FIELDS
from r1hpc.submission.run_estimate import estimate_for
from tests.accounting.history import GroupRun
from tests.recorded import EPOCH, RecordedRun

PRIOR = Spread(70.0, 100.0, 150.0)
PLANNED = Planned("a100", "pretrain", PRIOR, num_gpus=8, params=1e9)


def finished(ratio: float, at: float = 0.0, planned: Planned = PLANNED, useful: float = 0.9) -> FinishedRun:
    return FinishedRun(
        run_id=f"r{at:g}",
        resource=planned.resource,
        stage=planned.stage,
        finished_at=at,
        estimate=planned.estimate,
        hours=ratio * planned.estimate.p50,
        source="run",
        useful_share=useful,
        num_gpus=planned.num_gpus,
        params=planned.params,
    )


def runs(*ratios: float, **change: Any) -> list[FinishedRun]:
    return [finished(ratio, at=i, **change) for i, ratio in enumerate(ratios)]


def sized(factor: float) -> Planned:
    """PLANNED with so many times its hours."""
    return replace(PLANNED, estimate=PRIOR * factor)


def band(spread: Spread) -> float:
    return spread.p90 / spread.p10


def test_without_a_run_the_estimate_stays() -> None:
    nothing = correction(PLANNED, [])
    assert nothing.corrected == PRIOR
    assert "no finished pretrain run of such a size on a100 yet" in nothing.basis


def test_runs_like_it_are_blended_as_in_the_conjugate_normal_model() -> None:
    """Of long runs that all say 2: a weight of tau^2 / (tau^2 + s^2 / n) on ln 2."""
    long = sized(1e4)
    found = correction(long, runs(2.0, 2.0, 2.0, planned=long))
    tau2 = (math.log(150 / 70) / 2 / 1.2816) ** 2 - RUN_SPREAD**2
    s2 = RUN_SPREAD**2 / (1 + 2)
    weight = tau2 / (tau2 + s2 / 3)
    assert found.weight == pytest.approx(weight, abs=1e-3)
    assert math.log(found.factor) == pytest.approx(weight * math.log(2), rel=1e-3)
    assert band(found.corrected) < band(long.estimate)


def test_more_runs_weigh_more_and_narrow_the_band() -> None:
    found = [correction(PLANNED, runs(*[2.0] * n)) for n in range(1, 9)]
    factors = [each.factor for each in found]
    assert factors == sorted(factors)
    assert 1.2 < factors[0] < factors[-1] < 2
    widths = [each.width for each in found]
    assert widths == sorted(widths, reverse=True)


def test_a_sure_prior_gives_way_more_slowly_than_an_unsure_one() -> None:
    sure, unsure = (replace(PLANNED, estimate=Spread(100 / f, 100, 100 * f)) for f in (1.1, 3.0))
    weights = [correction(each, runs(2.0, planned=each)).weight for each in (sure, unsure)]
    assert weights[0] < 0.1 < 0.9 < weights[1]


def test_runs_that_disagree_weigh_less_and_widen_the_band() -> None:
    calm, wild = (correction(PLANNED, runs(*each)) for each in ([2.0] * 4, [0.5, 1.0, 4.0, 8.0]))
    assert wild.weight < 0.6 * calm.weight
    assert wild.width > 1 > calm.width


def test_one_odd_run_hardly_moves_the_factor_but_widens_the_band() -> None:
    calm, odd = (correction(PLANNED, runs(2.0, 2.0, 2.0, 2.0, last)) for last in (2.0, 20.0))
    assert odd.factor == pytest.approx(calm.factor, rel=0.1)
    assert band(odd.corrected) > 2 * band(calm.corrected)


def test_a_long_run_counts_for_more_than_a_short_one() -> None:
    """Of an hour each on 8 GPUs, and of six minutes of useful time."""
    long, short = (correction(sized(0.08), runs(2.0, planned=sized(0.08), useful=u)) for u in (1.0, 0.51))
    assert long.factor > short.factor > 1


def test_the_further_a_run_is_the_less_it_says() -> None:
    own = runs(*[2.0] * 8)
    by_hours = [correction(sized(10**k), own).factor for k in range(5)]
    by_size = [correction(replace(PLANNED, params=10.0 ** (9 + k)), own).factor for k in range(5)]
    for factors in (by_hours, by_size):
        assert factors == sorted(factors, reverse=True)
        assert factors[0] > 1.5
        assert factors[-1] == pytest.approx(1, abs=0.01)


def test_stages_and_resources_are_kept_apart() -> None:
    own = [*runs(*[3.0] * 5), *runs(*[0.5] * 5, planned=replace(PLANNED, stage="rl"))]
    assert correction(PLANNED, own).factor > 2
    assert correction(replace(PLANNED, stage="rl"), own).factor < 0.7
    assert correction(replace(PLANNED, stage="sft"), own).corrected == PRIOR
    assert correction(replace(PLANNED, resource="h100"), own).corrected == PRIOR
    assert correction(PLANNED, own).num_others == 5


@given(
    st.lists(st.tuples(st.floats(0.2, 5), st.floats(-5, -3.2)), min_size=1, max_size=40),
    st.floats(1.1, 4.0),
)
def test_runs_that_are_far_away_never_narrow_the_band(
    others: list[tuple[float, float]], width: float
) -> None:
    """A thousandth of the hours and less, however many and however alike."""
    hours = Spread(1e5 / width, 1e5, 1e5 * width)
    planned = replace(PLANNED, estimate=hours, num_gpus=1)
    far = [
        finished(
            ratio,
            at=i,
            planned=replace(planned, estimate=hours * 10**k),
        )
        for i, (ratio, k) in enumerate(others)
    ]
    assert band(correction(planned, far).corrected) >= band(hours) * (1 - 1e-4)


def test_only_the_newest_runs_count() -> None:
    moved = correction(PLANNED, runs(*[9.0] * MOST_RUNS, *[1.5] * MOST_RUNS))
    assert moved.num_runs == MOST_RUNS
    assert moved.factor == correction(PLANNED, runs(*[1.5] * MOST_RUNS)).factor


@pytest.mark.parametrize(
    ("num", "spread", "least", "most"),
    [
        (1, 0.16, 0.76, 0.9),
        (3, 0.16, 0.74, 0.9),
        (12, 0.16, 0.74, 0.86),
        (5, 0.3, 0.66, 0.84),
        (12, 0.3, 0.74, 0.86),
    ],
)
def test_the_interval_holds_the_next_run_four_times_out_of_five(
    num: int, spread: float, least: float, most: float
) -> None:
    """On sites whose bias is drawn as the prior has it. A spread of 0.3 is twice what is assumed at first."""
    dice = random.Random(1)
    planned = replace(PLANNED, estimate=Spread(100 / 1.9, 100, 190))
    inside = 0
    for _ in range(600):
        bias = dice.gauss(0, math.sqrt((math.log(1.9) / 1.2816) ** 2 - RUN_SPREAD**2))
        ratios = [math.exp(bias + dice.gauss(0, spread)) for _ in range(num + 1)]
        next_run = correction(planned, runs(*ratios[:-1], planned=planned)).corrected
        inside += next_run.p10 <= 100 * ratios[-1] <= next_run.p90
    assert least <= inside / 600 <= most


def test_six_runs_halve_the_error_over_ten_seeds_of_noise() -> None:
    """Of a site that takes half as long again, its runs spread as those of one published family."""
    ratios = []
    for seed in range(10):
        dice = random.Random(seed)
        found = effect(score(runs(*(1.5 * math.exp(dice.gauss(0, RUN_SPREAD)) for _ in range(6)))))
        assert found is not None
        ratios.append(found.after.median_error / found.before.median_error)
    assert statistics.median(ratios) <= 0.5
    assert sum(ratio < 1 for ratio in ratios) >= 9


def test_each_run_is_judged_by_the_runs_before_it_alone() -> None:
    scored = score(runs(2.0, 2.0, 2.0, 2.0, 2.0, 2.0))
    assert scored[0].error_after == scored[0].error_before == 0.5
    afters = [each.error_after for each in scored]
    assert afters == sorted(afters, reverse=True)
    assert afters[-1] < 0.15
    assert effect(scored[:1]) is None
    shown = effect(scored)
    assert shown is not None
    assert (shown.num_runs, shown.before.num_inside) == (5, 0)
    assert shown.after.num_inside >= 4
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


SEVEN_B = "--params 7B --tokens 1T --gpu a100-80gb --num-gpus 256 --json"


def smoke_run(root: Path, number: int, startup_s: float, seconds: float = 75) -> None:
    """On eight A100s, estimated at a sixth of what it took."""
    made = GroupRun(root / f"smoke{number}", 1.79e9 + 1000 * number, gpus=8)
    hours_taken = seconds / 3600
    made.estimate(*(8 * hours_taken / 5.7 * factor for factor in (1 / 1.5, 1, 1.5)))
    made.submit(f"local-{number}")
    made.begin()
    made.gpu_log(made.clock, 1.0)
    made.work(1, 60, hours_taken, startup_h=startup_s / 3600)
    made.end("finished", 60)


@pytest.mark.parametrize("startup_s", [5, 60])
def test_five_smoke_runs_leave_a_large_estimate_alone(
    tmp_path: Path, startup_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """7 B on 1 T tokens on 256 A100s."""
    words = [*SEVEN_B.split(), "--run-root", str(tmp_path)]
    assert estimate_command.main(words) == 0
    before = json.loads(capsys.readouterr().out)["gpu_hours"]
    for number in range(5):
        smoke_run(tmp_path, number, startup_s)
    assert len(finished_runs(tmp_path).of("A100-SXM4-80GB")) == 5
    assert estimate_command.main(words) == 0
    after = json.loads(capsys.readouterr().out)["gpu_hours"]
    assert after["p50"] == pytest.approx(before["p50"], rel=0.15)
    assert after["p90"] / after["p10"] >= 0.999 * before["p90"] / before["p10"]


def test_smoke_runs_correct_the_next_smoke_run(tmp_path: Path) -> None:
    for number in range(6):
        smoke_run(tmp_path, number, startup_s=60)
    *before, last = finished_runs(tmp_path).of("A100-SXM4-80GB")
    assert last.is_startup
    assert last.stage == "pretrain"
    found = correction(last.planned, before).corrected
    assert abs(found.p50 / last.hours - 1) < 0.5 * abs(last.estimate.p50 / last.hours - 1)


def test_long_runs_correct_a_large_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What must not happen for smoke runs does for runs of 20,000 GPU-hours, all half as long again."""
    for number in range(5):
        made = GroupRun(tmp_path / f"run{number}", 1.79e9 + 1e6 * number, gpus=64)
        made.estimate(14_000, 20_000, 29_000)
        made.submit(f"local-{number}")
        made.begin()
        made.gpu_log(made.clock, 1.0)
        made.work(1, 200, 1.5 * 20_000 / 64)
        made.end("finished", 200)
    words = [*SEVEN_B.split(), "--run-root", str(tmp_path)]
    assert estimate_command.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correction"]["num_runs"] == 5
    assert 1.2 < found["gpu_hours"]["p50"] / found["uncorrected"]["gpu_hours"]["p50"] < 1.5
    wall, hours = found["wall_hours"]["256"]["p50"], found["gpu_hours"]["p50"]
    assert wall == pytest.approx(hours / 256)


def test_a_submission_is_corrected_and_keeps_what_was_estimated(tmp_path: Path) -> None:
    """The same job again: five runs took twice their estimate."""
    config = load("smoke")
    plan = make_plan(config, gpus_per_node=0, vocab_size=512)
    first, _ = estimate_for(tmp_path / "none", config, plan)
    assert first is not None
    assert "correction" not in first
    estimated_s = 3600 * first["node_hours"]["p50"]
    for number in range(5):
        made = RecordedRun(tmp_path / "runs" / f"run{number}")
        made.submit(f"local-{number}")
        made.attempt(1, 10, "finished", committed=10, step_s=(2 * estimated_s - 12) / 10)
        write_json(made.run.path / "estimate.json", first)
    again, _ = estimate_for(tmp_path / "runs", config, plan)
    assert again is not None
    assert again["uncorrected"]["node_hours"] == first["node_hours"]
    assert again["correction"]["num_runs"] == 5
    assert 1.8 < again["node_hours"]["p50"] / first["node_hours"]["p50"] < 2.1


def test_what_is_kept_is_used_until_the_run_or_its_estimate_changes(tmp_path: Path) -> None:
    made = make(tmp_path, "run", estimate={"node_hours": hours(1.0)})
    first = finished_runs(tmp_path)
    made.run.attempts.unlink()
    assert finished_runs(tmp_path) == first, "attempts.jsonl is not read again"
    store(made, {"node_hours": hours(2.0)})
    assert finished_runs(tmp_path).left_out == {"no time on record": 1}
    damaged = {"version": 5, "runs": {"run": 3, "other": {"mark": [], "run": {"estimate": 1}}}}
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
