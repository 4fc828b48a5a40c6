"""The budget file, its verdicts, Slurm's own limits, the command. Slurm's answers: recorded from 24.11.5."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1hpc.accounting.budget import (
    Budget,
    RunRequest,
    Verdict,
    check_budget,
    find_budget,
    format_day,
    format_hours,
    load_budget,
)
from r1hpc.accounting.budget_status import check_submission, read_budget_status
from r1hpc.accounting.forecast import Spread, around, until_limit
from r1hpc.accounting.hours import midnight_before
from r1hpc.accounting.ledger import clip
from r1hpc.accounting.open_ledger import survey
from r1hpc.base.errors import ConfigError
from r1hpc.config.load import assets
from r1hpc.slurm.limits import TresLimit, gpu_limits, read_assoc_mgr, read_sshare
from r1hpc.slurm.queue import QueuedJob, read_squeue
from tests.accounting.history import DAY, make_history
from tests.cluster import Cluster

NOW = 1_795_600_000.0
ASSOC_MGR = """Current Association Manager state
Association Records
ClusterName=r1hpc Account=root UserName= Partition= Priority=0 ID=1 ParentAccount= Lineage=/ DefAssoc=No \
GrpTRES=cpu=N(1),gres/gpu=N(4) GrpTRESMins=cpu=100000(0),mem=N(333),gres/gpu=600(120),gres/gpu:a100=N(120) \
GrpTRESRunMins=cpu=N(10),gres/gpu=N(40),gres/gpu:a100=N(40) MaxJobs= Comment=(null)
ClusterName=r1hpc Account=research UserName= Partition= Priority=0 ID=3 ParentAccount=root(1) \
GrpTRESMins=cpu=N(0),gres/gpu=N(60),gres/gpu:a100=N(60) GrpTRESRunMins=gres/gpu=N(40),gres/gpu:a100=N(40)
ClusterName=r1hpc Account=research UserName=ada(1000) Partition= ParentAccount= \
GrpTRESMins=gres/gpu=N(60),gres/gpu:a100=300(60) GrpTRESRunMins=gres/gpu=N(40),gres/gpu:a100=N(40)
ClusterName=r1hpc Account=other UserName= ParentAccount=root(1) GrpTRESMins=gres/gpu=6(0)
QOS Records
QOS=normal(1) UsageRaw=0.0 GrpTRESMins=cpu=N(0),gres/gpu=N(0) GrpTRESRunMins=gres/gpu=N(40)
QOS=scavenger(2) UsageRaw=0.0 GrpTRESMins=mem=N(0),gres/gpu=90(30) GrpTRESRunMins=gres/gpu=N(0)
"""
SSHARE = (
    "root||cpu=100000,gres/gpu=600|cpu=10,node=10,gres/gpu=40,gres/gpu:a100=40|cpu=3,gres/gpu=120\n"
    " root|ada||cpu=0,gres/gpu=0|cpu=0,gres/gpu=0\n"
)
SQUEUE = (
    "2_0|PENDING|cpu=2,mem=2000M,node=2,billing=2,gres/gpu=8|15:00|0:00|research|ada|normal|wrap|\n"
    "1|RUNNING|cpu=1,node=1,billing=1,gres/gpu=4,gres/gpu:a100=4|10:00|0:12|research|root|normal|a|b|\n"
    "3|RUNNING|cpu=1,node=1,gres/gpu=1|UNLIMITED|1-00:00:12|research|root|normal|x|\n"
    "4|COMPLETED|cpu=1,node=1,gres/gpu=1|10:00|9:00|research|root|normal|x|\n"
)


def budget_file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "budget.yaml"
    path.write_text(text)
    return path


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
        ("gpu_hours: -5", "gpu_hours is -5: it must be a positive number"),
        ("gpu_hours: many", "must be a positive number"),
        ("gpu_hours: 5\nstart: tomorrow", "write a day such as"),
        ("gpu_hours: 5\nstart: 2026-10-02\nend: 2026-10-01", "start must lie before end"),
        ("gpu_hours: 5\nwarn_at: [80]", "a list of shares"),
        ("gpu_hours: 5\noverride: perhaps", "true or false"),
        ("account: 5\ngpu_hours: 5", "must be text"),
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


def run_of(p50: float | None, p90: float | None = None, **known: Any) -> RunRequest:
    """One run by its P50 and P90."""
    return RunRequest(None if p50 is None else Spread(p50, p50, p90 or p50), **known)


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
    assert first == "with this run 81 % of 1,000 GPU-hours are spent or promised: past the mark at 80 %"
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
    assert any("for want of a time limit" in warning for warning in refused.warnings)
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


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0, "0"),
        (12345.6, "12,346"),
        (123.45, "123.5"),
        (1.234, "1.23"),
        (0.0123, "0.012"),
        (0.00123, "0.0012"),
    ],
)
def test_hours_as_people_read_them(hours: float, text: str) -> None:
    assert format_hours(hours) == text


# Slurm's words


def test_limits_of_an_account_its_parents_and_a_qos() -> None:
    found = read_assoc_mgr(ASSOC_MGR, "research", "scavenger")
    assert [(limit.owner, limit.tres) for limit in found] == [
        ("account root", "gres/gpu"),
        ("account research, user ada", "gres/gpu:a100"),
        ("qos scavenger", "gres/gpu"),
    ]
    root = found[0]
    assert (root.gpu_hours, root.used) == (10.0, 2.0)
    assert root.running == pytest.approx(2 / 3)
    assert root.left == pytest.approx(10 - 2 - 2 / 3)
    assert (found[2].gpu_hours, found[2].used) == (1.5, 0.5)
    assert len(read_assoc_mgr(ASSOC_MGR, None)) == 4
    assert len(read_assoc_mgr(ASSOC_MGR, "research", user="bob")) == 1, "not what binds somebody else"
    assert read_assoc_mgr("", "research") == []


def test_limits_as_sshare_prints_them() -> None:
    (limit,) = read_sshare(SSHARE)
    assert (limit.owner, limit.gpu_hours, limit.used) == ("account root", 10.0, 2.0)
    assert limit.running == pytest.approx(2 / 3)


def test_jobs_as_squeue_prints_them() -> None:
    pending, running, endless = read_squeue(SQUEUE)
    assert pending == QueuedJob("2_0", "PENDING", 8, 900, 0, "research", "ada", "normal", "wrap")
    assert (running.job_name, running.gpus) == ("a|b", 4)
    assert running.used == pytest.approx(4 * 12 / 3600)
    assert running.most_left == pytest.approx(4 * 588 / 3600)
    assert endless.most_left is None


# Everything together


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group's run root, in a place without Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("R1HPC_BUDGET", raising=False)
    return make_history(tmp_path / "runs", time.time())


def test_spent_and_promised_from_the_run_folders(root: Path) -> None:
    runs, notes = survey(root, time.time())
    status = read_budget_status(None, runs, time.time())
    assert notes == []
    assert status.spent == pytest.approx(sum(run.used for run in runs), rel=1e-6)
    assert (status.num_running, status.num_queued) == (1, 1)
    assert status.queued == Spread(350, 520, 800), "what waits has its estimate"
    assert status.source == "run folders"
    assert "Slurm's own limits are not known" in status.notes[0]
    for run in runs:
        for each in run.attempts:
            assert each.hours == pytest.approx(each.width * (each.end - each.start) / 3600)


def test_how_long_the_rest_lasts(root: Path) -> None:
    now = time.time()
    days = {format_day(now - 40 * DAY): 9999.0, format_day(now - DAY): 140.0}
    status = replace(read_budget_status(None, [], now, ask_slurm=False), by_day=days)
    days_counted = (now - midnight_before(now, -14)) / DAY
    assert status.lasts_until(100, now) == pytest.approx(now + days_counted * 10 / 14 * DAY, abs=1)
    assert status.lasts_until(0, now) is None
    assert replace(status, by_day={format_day(now - 20 * DAY): 140.0}).lasts_until(100, now) is None
    assert replace(status, by_day={format_day(now - DAY): 140.0}).lasts_until(100, now) is None


def test_a_run_counts_by_its_pace_once_it_has_one(root: Path) -> None:
    running = next(run for run in survey(root, time.time())[0] if run.state == "running")
    assert running.share_done == pytest.approx(0.35)
    assert running.to_come.p50 == pytest.approx(running.used * 0.65 / 0.35)


def test_a_run_over_its_time_limit_once_still_has_the_next_attempts(root: Path) -> None:
    """The limit is of one attempt, and an estimate that was passed long ago leaves something to come."""
    runs = survey(root, time.time())[0]
    running = next(run for run in runs if run.state == "running")
    early = replace(running, num_steps=10**9, planned=None)
    (attempt,) = early.attempts
    again = replace(early, attempts=(attempt, attempt), ceiling=1.5 * attempt.hours)
    assert again.to_come.p50 == pytest.approx(until_limit(0.5 * attempt.hours).p50)
    assert replace(early, planned=around(early.used / 20)).to_come.p50 > 0.05 * early.used
    waiting = next(run for run in runs if run.state == "queued")
    requeued = replace(waiting, attempts=(attempt,), planned=None, ceiling=attempt.hours)
    assert requeued.to_come == until_limit(attempt.hours)


def test_nothing_after_the_end_of_its_period_is_spent_of_a_budget(root: Path) -> None:
    now = time.time()
    runs, end = survey(root, now)[0], now - 30 * DAY
    period = Budget(root / "b.yaml", gpu_hours=9000, start=now - 70 * DAY, end=end)
    status = read_budget_status(period, runs, now, ask_slurm=False)
    assert status.spent == pytest.approx(sum(run.used for run in clip(runs, None, end)))
    assert 0 < status.spent < read_budget_status(None, runs, now, ask_slurm=False).spent
    assert max(status.by_day) <= format_day(end)


def test_a_submission_is_checked_against_all_of_it(root: Path) -> None:
    assert check_submission(root, [run_of(1e9)]) == Verdict(True, "", ())
    budget_file(root, "gpu_hours: 9000\n")
    refused = check_submission(root, [run_of(100, 150)], ask_slurm=False)
    assert not refused.allowed
    assert "running and queued" in refused.sentence
    assert check_submission(root, [run_of(100, 150)], ask_slurm=False, over_budget=True).allowed


def test_a_submission_is_told_what_could_not_be_counted(root: Path) -> None:
    budget_file(root, "gpu_hours: 90000\naccount: lab\n")
    (root / "eval-math" / "attempts.jsonl").write_text('{"event": "begin"}\n')
    for ask_slurm in (True, False):
        said = " ".join(check_submission(root, [run_of(100)], ask_slurm=ask_slurm).warnings)
        assert "spent is of the runs under the run root, not of all jobs of account lab: " in said
        assert ("sacct is not on PATH" in said) is ask_slurm
        assert "eval-math is left out" in said


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Slurm's commands as small programs that print what was recorded."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def say(**words: str) -> None:
        for name, text in words.items():
            (folder / f"{name}.txt").write_text(text)
            (folder / name).write_text(f"#!/bin/sh\nexec cat {folder}/{name}.txt\n")
            (folder / name).chmod(0o700)

    say(scontrol=ASSOC_MGR, squeue=SQUEUE)
    return say


def test_an_account_is_counted_by_slurm(slurm: Callable[..., None], tmp_path: Path) -> None:
    header = "JobID|User|Account|Partition|QOS|State|Start|End|ElapsedRaw|AllocTRES|JobName\n"
    start = int(NOW - 10 * DAY)
    rows = [
        f"7|ada|research|gpu|normal|PREEMPTED|{start}|{start + 3600}|3600|gres/gpu=8,gres/gpu:a100=8|x|y\n",
        f"7|ada|research|gpu|normal|COMPLETED|{start + 7200}|{start + 10800}|3600|gres/gpu:a100=8|x|y\n",
    ]
    slurm(sacct=header + "".join(rows))
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20)
    status = read_budget_status(budget, [], NOW)
    assert status.source == "sacct"
    assert status.spent == pytest.approx(16)
    assert (status.num_running, status.num_queued) == (2, 1)
    assert status.queued.p50 == pytest.approx(0.5 * 8 * 900 / 3600), "half its limit"
    assert {limit.owner for limit in status.limits} == {"account root"}


def test_without_its_limits_slurms_accounting_is_counted_all_the_same(
    slurm: Callable[..., None], tmp_path: Path
) -> None:
    start = int(NOW - 10 * DAY)
    slurm(sacct=f"JobID|Start|ElapsedRaw|AllocTRES\n7|{start}|7200|gres/gpu=8\n")
    for name in ("scontrol", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20)
    status = read_budget_status(budget, [], NOW)
    assert (status.source, status.spent) == ("sacct", 16.0)
    limits, jobs = status.notes
    assert limits.startswith("Slurm's own limits are not known: ")
    assert jobs.startswith("running and queued are of the runs under the run root alone: ")


def test_sacct_is_asked_for_the_budgets_period(slurm: Callable[..., None], tmp_path: Path) -> None:
    start, end = int(NOW - 10 * DAY), int(NOW - 9 * DAY)
    slurm(sacct=f"JobID|Start|ElapsedRaw|AllocTRES\n7|{end - 3600}|7200|gres/gpu=8\n")
    script = tmp_path / "bin" / "sacct"
    script.write_text(script.read_text().replace("exec", f'echo "$@" > {tmp_path}/asked\nexec'))
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20, start=start, end=end)
    assert read_budget_status(budget, [], NOW).spent == 8.0
    assert f"-Suts{start} -Euts{end} -Aresearch" in (tmp_path / "asked").read_text()


def test_a_qos_limit_holds_a_submission(slurm: Callable[..., None], tmp_path: Path) -> None:
    verdict = check_submission(tmp_path, [run_of(1.2)], account="research", qos="scavenger")
    assert not verdict.allowed
    assert "qos scavenger leaves 1.00 of 1.50" in verdict.sentence
    assert check_submission(tmp_path, [run_of(0.8)], account="research", qos="scavenger").allowed


@pytest.mark.slurm
def test_limits_and_usage_of_a_real_cluster(
    idle_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in idle_cluster.env().items():
        monkeypatch.setenv(name, value)
    change = ["sacctmgr", "-i", "modify", "account", "research", "set"]
    idle_cluster.run([*change, "GrpTRESMins=gres/gpu=600,cpu=100000"])
    try:
        job = idle_cluster.submit("sleep 60", "-N1", "--gres=gpu:4", "-t", "30", cwd=tmp_path)
        idle_cluster.wait_job(job, {"RUNNING"})
        deadline = time.time() + 30
        while time.time() < deadline and not any(limit.running for limit in gpu_limits("research")):
            time.sleep(1)
        (limit,) = gpu_limits("research")
        assert (limit.owner, limit.gpu_hours) == ("account research", 10.0)
        assert limit.running == pytest.approx(2.0, abs=0.2), "4 GPUs x 30 minutes are held"
        text = idle_cluster.run(["sshare", "-nP", "-A", "research", "-o", SSHARE_FIELDS]).stdout
        assert read_sshare(text)[0].gpu_hours == 10.0
    finally:
        idle_cluster.run([*change, "GrpTRESMins=gres/gpu=-1,cpu=-1"])


SSHARE_FIELDS = "Account,User,GrpTRESMins,TRESRunMins,GrpTRESRaw"
