"""The budget file, and the verdicts on runs that are held against it."""

import time
from pathlib import Path
from typing import Any

import pytest

from r1hpc.accounting.budget import Budget, Verdict, check_budget, find_budget, load_budget
from r1hpc.base.errors import ConfigError
from r1hpc.config.load import assets
from r1hpc.plan.hours.spread import Spread
from r1hpc.slurm.queue import TresLimit
from tests.accounting.budgets import NOW, budget_file, run_of
from tests.accounting.history import DAY

# The file


def test_the_example_is_inactive_and_every_key_of_it_is_known() -> None:
    assert load_budget(assets("configs") / "budget.yaml") is None


def test_a_budget_is_read(tmp_path: Path) -> None:
    path = budget_file(
        tmp_path, "gpu_hours: 20000\nstart: 2026-10-01\nend: 2026-12-31\nwarn_at: [0.9, 0.5]\n"
    )
    budget = load_budget(path)
    assert budget is not None
    assert (budget.gpu_hours, budget.warn_at, budget.override) == (20000, (0.5, 0.9), True)
    assert budget.start is not None
    assert budget.end is not None
    assert time.localtime(budget.start)[:5] == (2026, 10, 1, 0, 0)
    assert time.localtime(budget.end)[:5] == (2027, 1, 1, 0, 0), "the last day counts"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu_hour: 5", "unknown key 'gpu_hour'.*did you mean 'gpu_hours'"),
        ("gpu_hours: -5", "gpu_hours is -5.0: it must be above 0"),
        ("gpu_hours: many", "gpu_hours is 'many': it must be a number"),
        ("gpu_hours: 5\nstart: tomorrow", "write a day such as"),
        ("gpu_hours: 5\nstart: 2026-10-02\nend: 2026-10-01", "start must lie before end"),
        ("gpu_hours: 5\nwarn_at: [80]", r"warn_at is 80\.0: it must be above 0 and at most 1"),
        ("gpu_hours: 5\noverride: perhaps", "true or false"),
        ("users: {ada: 0}", r"users\.ada is 0\.0: it must be above 0"),
        ("users: 500", "users is a mapping"),
        ("account: [a]\ngpu_hours: 5", "account is one value, not a list"),
        ("[1, 2]", "must hold keys and values, not a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_budget_names_the_file_and_the_fix(text: str, words: str, tmp_path: Path) -> None:
    path = budget_file(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as raised:
        load_budget(path)
    assert str(path) in str(raised.value)


def test_where_a_budget_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)
    assert find_budget(tmp_path) == assets("configs") / "budget.yaml"
    own = budget_file(tmp_path, "gpu_hours: 5")
    assert find_budget(tmp_path) == own
    monkeypatch.setenv("R1HPC_BUDGET", str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match="no budget file"):
        find_budget(tmp_path)
    assert find_budget(tmp_path, own) == own


# Verdicts

GRANTED = Budget(Path("budget.yaml"), gpu_hours=1000, end=NOW + 30 * DAY)


def judge(
    p50: float | None,
    p90: float | None = None,
    budget: Budget | None = GRANTED,
    ceiling: float | None = None,
    gpu: str | None = None,
    **how: Any,
) -> Verdict:
    """The verdict on one run."""
    return check_budget(budget, [run_of(p50, p90, ceiling=ceiling, gpu=gpu)], now=NOW, **how)


def test_without_a_budget_everything_goes() -> None:
    assert judge(1e9, budget=None) == Verdict(True, "", ())
    assert judge(None, budget=None) == Verdict(True, "", ())


def test_a_run_that_fits_is_told_what_is_left() -> None:
    verdict = judge(100, 150, spent=200, committed=Spread(50, 60, 80))
    assert (verdict.allowed, verdict.warnings) == (True, ())
    assert "of 1,000 GPU-hours are left until" in verdict.sentence


def test_a_run_that_does_not_fit_is_refused_with_the_number_and_the_way_around() -> None:
    verdict = judge(800, 900, spent=200, committed=Spread(50, 60, 80))
    assert not verdict.allowed
    for words in ("needs about 800.0", "740.0 of 1,000", "spent 200.0", "running and queued 60.00"):
        assert words in verdict.sentence
    assert "change gpu_hours in budget.yaml" in verdict.sentence
    assert "--over-budget REASON" in verdict.sentence


def test_over_budget_lets_it_through_unless_the_group_forbids_it() -> None:
    allowed = judge(2000, over_budget=True)
    assert allowed.allowed
    assert allowed.sentence.startswith("over budget: this run needs about 2,000")
    strict = Budget(Path("b.yaml"), gpu_hours=1000, override=False)
    refused = judge(2000, budget=strict, over_budget=True)
    assert not refused.allowed
    assert "--over-budget" not in refused.sentence


def test_marks_and_a_p90_that_does_not_fit_are_warnings() -> None:
    first = judge(110, 120, spent=700).warnings[0]
    assert (
        first
        == "with this run, 81 % of 1,000 GPU-hours are spent or promised: above the warning level of 80 %"
    )
    assert "60 % of 1,000" in judge(10, 12, spent=600).warnings[0]
    risky = judge(200, 500, spent=700)
    assert risky.allowed
    assert "at its P90 (500.0 GPU-hours)" in risky.warnings[-1]


def test_a_run_larger_than_any_may_be() -> None:
    small = Budget(Path("b.yaml"), max_gpu_hours_per_run=50)
    assert judge(40, budget=small).allowed
    refused = judge(60, budget=small)
    assert "max_gpu_hours_per_run is 50" in refused.sentence
    assert "change max_gpu_hours_per_run in b.yaml" in refused.sentence


def test_the_limit_of_a_run_is_held_against_each_run_and_the_budget_against_their_sum() -> None:
    budget = Budget(Path("b.yaml"), gpu_hours=1000, max_gpu_hours_per_run=500)
    six = [run_of(100)] * 6
    assert check_budget(budget, six, now=NOW).allowed
    refused = check_budget(budget, six, spent=500, now=NOW)
    assert "these 6 runs need about 600.0 GPU-hours together, and 500.0 of 1,000" in refused.sentence
    wide = check_budget(budget, [run_of(100), run_of(600)], now=NOW)
    assert "the largest of these runs needs about 600.0 GPU-hours, and max_gpu_hours_per_run" in wide.sentence
    slice_ = check_budget(budget, [run_of(100, whole=600.0)], now=NOW)
    assert "this run needs about 600.0 GPU-hours, and max_gpu_hours_per_run is 500.0" in slice_.sentence


def test_a_run_without_an_estimate_counts_by_its_time_limit_beside_the_others() -> None:
    together = [run_of(900), run_of(None, ceiling=200), run_of(None)]
    refused = check_budget(GRANTED, together, now=NOW)
    assert "these 3 runs need about 1,100 GPU-hours together" in refused.sentence
    assert "1 of these 3 runs without an estimate: the time limit was counted instead" in refused.warnings
    assert any("no time limit is set" in warning for warning in refused.warnings)
    assert not check_budget(GRANTED, [run_of(None, ceiling=600)] * 2, now=NOW).allowed


def test_after_its_period_a_budget_grants_nothing() -> None:
    over = Budget(Path("b.yaml"), gpu_hours=1000, end=NOW - DAY)
    refused = judge(1, budget=over)
    assert not refused.allowed
    assert "ended on" in refused.sentence
    assert "change end in b.yaml" in refused.sentence


def test_an_unknown_cost_counts_as_its_ceiling() -> None:
    assert not judge(None, ceiling=1200).allowed
    allowed = judge(None, ceiling=100)
    assert allowed.allowed
    assert "no estimate" in allowed.warnings[0]
    assert judge(None).allowed
    assert not judge(None, spent=1000).allowed


def test_slurms_own_limit_refuses_and_warns_before_a_job_pends_for_ever() -> None:
    limit = TresLimit("account", "research", "", "gres/gpu", 100, 20, 10)
    refused = judge(81, budget=None, limits=[limit])
    assert not refused.allowed
    assert "GrpTRESMins of account research leaves 80.00 of 100.0" in refused.sentence
    warned = judge(50, budget=None, limits=[limit], ceiling=96)
    assert warned.allowed
    assert "stay pending" in warned.warnings[0]


def test_what_slurm_only_holds_for_running_jobs_refuses_nothing() -> None:
    limit = TresLimit("account", "research", "", "gres/gpu", 1000, 0, 980)
    waits = judge(50, budget=None, limits=[limit])
    assert waits.allowed
    assert "holds 980.0 GPU-hours of the GrpTRESMins of account research for running" in waits.warnings[0]
    assert "this run will wait" in waits.warnings[0]
    assert judge(15, budget=None, limits=[limit], ceiling=20).warnings == ()


@pytest.mark.parametrize(
    ("gpu", "allowed"),
    [("NVIDIA H100 80GB HBM3", False), ("a100-80gb", True), ("tpu", True), (None, True)],
)
def test_a_limit_on_one_card_holds_runs_on_that_card(gpu: str | None, allowed: bool) -> None:
    limit = TresLimit("account", "research", "", "gres/gpu:h100", 10, 0, 0)
    verdict = judge(50, budget=None, limits=[limit], gpu=gpu, ceiling=60)
    assert verdict.allowed is allowed
    assert ("account research (gres/gpu:h100) leaves 10.00" in verdict.sentence) is not allowed
    assert verdict.warnings == ()


def test_a_folder_or_a_broken_link_is_no_budget_and_not_none(tmp_path: Path) -> None:
    """Its limits would be off without a word."""
    own = tmp_path / "budget.yaml"
    own.mkdir()
    with pytest.raises(ConfigError, match=r"budget\.yaml is no file: remove it"):
        load_budget(find_budget(tmp_path))
    own.rmdir()
    own.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"budget\.yaml is no file: remove it"):
        load_budget(find_budget(tmp_path))
