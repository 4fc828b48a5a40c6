"""A campaign against what happened: which run belongs to which stage, and what is still to come."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1hpc.accounting.budget import format_day
from r1hpc.accounting.campaign import Campaign, CampaignStage, follow, follow_campaign, load_campaign
from r1hpc.accounting.open_ledger import survey
from r1hpc.base.errors import ConfigError
from r1hpc.config.stages import STAGES
from r1hpc.plan.hours.spread import NOTHING, Spread
from tests.accounting.history import make_history

DAY = 86400.0
START = 1_795_000_000.0


def make_run(
    run_id: str,
    start: float,
    used: float = 10.0,
    stage: str = "pretrain",
    job_name: str = "",
    to_come: Spread = NOTHING,
) -> Any:
    """Return what a campaign must know of a run."""
    return SimpleNamespace(**locals(), summary=SimpleNamespace(job_name=job_name))


PLAN = Campaign(
    "a plan",
    (
        CampaignStage("first", 10, 100, runs=("env-*",)),
        CampaignStage("second", 20, 300, stages=("sft", "rl")),
        CampaignStage("third", 10, 50),
    ),
    START,
)


def day(number: float) -> float:
    return START + number * DAY


def test_the_template_is_the_articles_hundred_days() -> None:
    plan = load_campaign("hundred_days")
    assert [stage.days for stage in plan.stages] == [7, 15, 25, 40, 13]
    assert [stage.name for stage in plan.stages] == ["environment", "data", "model", "tuning", "deployment"]
    assert plan.days == 100
    assert plan.gpu_hours == pytest.approx(20000)
    assert {name for stage in plan.stages for name in stage.stages} <= set(STAGES)
    assert load_campaign("hundred_days", 500).gpu_hours == pytest.approx(500), "what was granted"


def test_runs_of_an_earlier_campaign_are_not_counted(tmp_path: Path) -> None:
    runs = survey(make_history(tmp_path / "runs", time.time()), time.time())[0]
    file = tmp_path / "next.yaml"
    stages = "stages: [{name: all, days: 10, gpu_hours: 100, stages: [pretrain, sft, rl]}]\n"
    file.write_text(f"start: {format_day(time.time() + DAY)}\n{stages}")
    found = follow_campaign(None, runs, time.time(), str(file))
    assert found is not None
    live = [run for run in runs if run.is_live and run.unit == "GPU-hours"]
    assert found.used == pytest.approx(sum(run.used for run in live))
    assert found.used < sum(run.used for run in runs)


def test_a_run_belongs_to_its_name_then_its_stage_then_its_days() -> None:
    runs = [
        make_run("env-check", day(35), 1),  # its name says so, whenever it was
        make_run("x", day(35), 2, stage="rl"),
        make_run("y", day(35), 4),
        make_run("z", day(2), 8),
        make_run("w", day(35), 16, job_name="env-2"),
        make_run("late", day(99), 32),
    ]
    progress = follow(PLAN, runs, day(50))
    assert [stage.used for stage in progress.stages] == [1 + 8 + 16, 2, 4]
    assert progress.elsewhere == 32
    assert progress.used == 63
    assert [stage.when for stage in progress.stages] == ["past", "past", "past"]
    assert progress.forecast == Spread(63, 63, 63), "nothing is to come"


def test_stages_ahead_are_forecast_by_their_plan_and_those_behind_by_what_they_took() -> None:
    running = make_run("r", day(12), 200, stage="rl", to_come=Spread(300, 400, 600))
    progress = follow(PLAN, [make_run("env-1", day(1), 20), running], day(15))
    first, second, third = progress.stages
    assert (first.when, first.forecast) == ("past", Spread(20, 20, 20))
    assert second.when == "now"
    assert second.forecast.p50 == pytest.approx(600), "what runs exceeds the plan"
    assert third.when == "ahead"
    assert third.forecast.p50 == pytest.approx(50)
    assert progress.forecast.p10 < 20 + 600 + 50 < progress.forecast.p90
    answer = progress.to_json()
    assert answer["planned_gpu_hours"] == 450
    assert answer["stages"][1]["used_gpu_hours"] == 200


def test_without_a_start_it_began_with_its_first_run() -> None:
    plan = Campaign("p", PLAN.stages)
    assert follow(plan, [make_run("a", day(3)), make_run("b", day(1))], day(5)).stages[0].start == day(1)
    assert follow(plan, [], day(5)).stages[0].start == day(5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x", "stages must be a list"),
        ("stages:\n  - days: 3", "needs a name"),
        ("stages:\n  - name: a\n    gpu_hours: 3", "stage a: days is missing"),
        ("stages:\n  - name: a\n    days: 3", "give gpu_hours, or share"),
        ("stages:\n  - name: a\n    days: 3\n    shares: 1", "unknown key 'shares'.*'share'"),
        (
            "stages:\n  - {name: a, days: 3, gpu_hours: 1, stages: [pretran]}",
            "'pretran' .did you mean",
        ),
        ("gpu_hours: 5\nstages:\n  - {name: a, days: 3, share: 1, runs: x}", "runs is a list: write"),
    ],
)
def test_a_bad_campaign_names_the_fix(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_campaign(str(path))


def test_an_unknown_campaign_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hundred_days'"):
        load_campaign("hundred_day")
