"""What is spent, promised and limited by Slurm, and a submission checked against all of it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.accounting.budget import Budget, Verdict, format_day
from r1hpc.accounting.budget_status import check_submission, read_budget_status
from r1hpc.accounting.hours import midnight_before
from r1hpc.accounting.ledger import clip
from r1hpc.accounting.open_ledger import survey
from r1hpc.plan.hours.spread import NOTHING, Spread, around, until_limit
from r1hpc.slurm.queue import QueuedJob, gpu_limits, read_assoc_mgr, read_squeue
from tests.accounting.budgets import NOW, budget_file, run_of
from tests.accounting.history import DAY, make_history
from tests.cluster import Cluster

# Slurm's answers, recorded from 24.11.5.
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
SQUEUE = (
    "2_0|PENDING|cpu=2,mem=2000M,node=2,billing=2,gres/gpu=8|15:00|0:00|\n"
    "1|RUNNING|cpu=1,node=1,billing=1,gres/gpu=4,gres/gpu:a100=4|10:00|0:12|\n"
    "3|RUNNING|cpu=1,node=1,gres/gpu=1|UNLIMITED|1-00:00:12|\n"
    "4|COMPLETED|cpu=1,node=1,gres/gpu=1|10:00|9:00|\n"
)


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
    alone = read_assoc_mgr(ASSOC_MGR, None, "scavenger")
    assert [limit.owner for limit in alone] == ["qos scavenger"], "not what binds accounts of others"
    assert len(read_assoc_mgr(ASSOC_MGR, "research", user="bob")) == 1, "not what binds somebody else"
    assert read_assoc_mgr("", "research") == []
    assert read_assoc_mgr(ASSOC_MGR, "Research", "scavenger") == found
    assert {limit.name for limit in read_assoc_mgr(ASSOC_MGR, "research, other")} == {
        "root",
        "research",
        "other",
    }


def test_jobs_as_squeue_prints_them() -> None:
    pending, running, endless = read_squeue(SQUEUE)
    assert pending == QueuedJob("2_0", "PENDING", 8, 900, 0)
    assert running.gpus == 4
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


def test_what_a_run_will_still_use_is_the_same_in_every_window(root: Path) -> None:
    now = time.time()
    running = next(run for run in survey(root, now)[0] if run.state == "running")
    part = running.selected(now - 3600, None).selected(now - 1800, None)
    assert 0 < part.used < 0.1 * running.used
    assert part.to_come == running.to_come


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
    assert status.by_user == {"ada": 16}
    assert [status.is_over(replace(budget, users={"ada": quota})) for quota in (15.9, 16)] == [True, False]


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


NO_GPU = "JobID|Start|ElapsedRaw|NNodes|AllocTRES\n7|{start}|7200|1|billing=8,cpu=8,node=1\n"


def test_where_slurm_counts_no_gpus_the_run_folders_are_counted(
    slurm: Callable[..., None], root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = survey(root, time.time())[0]
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    slurm(sacct=NO_GPU.format(start=int(time.time() - 10 * DAY)))
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20000)
    status = read_budget_status(budget, runs, time.time())
    assert status.source == "run folders"
    assert status.spent == pytest.approx(sum(run.used for run in runs))
    assert "no job on Slurm's record has a GPU" in status.notes[-1]
    nothing = read_budget_status(budget, [], time.time())
    assert (nothing.spent, nothing.notes) == (0, ()), "no GPU was used: nothing speaks against Slurm"


def test_hours_that_slurm_has_purged_still_count(
    slurm: Callable[..., None], root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = time.time()
    runs = survey(root, now)[0]
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    start = midnight_before(now - 10 * DAY)
    slurm(sacct=f"JobID|Start|ElapsedRaw|AllocTRES\n7|{start}|7200|gres/gpu=8\n")
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20000)
    assert read_budget_status(budget, runs, now).spent == 16, "Slurm never named an account for these runs"
    seen = [
        replace(
            run,
            attempts=tuple(
                replace(a, allocation=replace(a.allocation, account="research")) for a in run.attempts
            ),
        )
        for run in runs
    ]
    status = read_budget_status(budget, seen, now)
    before = sum(run.used for run in clip(seen, None, start))
    assert before > 0
    assert status.source == "sacct"
    assert status.spent == pytest.approx(16 + before)
    assert status.notes[-1].startswith("sacct no longer has jobs of ")


def test_where_slurm_hides_jobs_of_others_it_is_told(slurm: Callable[..., None], tmp_path: Path) -> None:
    slurm(sacct=NO_GPU.format(start=int(NOW)), sacctmgr="PrivateData            = none\n")
    budget = Budget(tmp_path / "b.yaml", account="research", gpu_hours=20)
    assert read_budget_status(budget, [], NOW).notes == ()
    slurm(sacctmgr="PrivateData            = accounts,jobs,usage\n")
    assert "(PrivateData=jobs)" in read_budget_status(budget, [], NOW).notes[0]


def test_runs_of_another_account_are_not_held_against_a_budget(root: Path) -> None:
    now = time.time()
    mine = survey(root, now)[0]
    others = [replace(run, asked_account="theirs") for run in mine]
    budget = Budget(root / "b.yaml", account="lab,own", gpu_hours=9000)
    assert read_budget_status(budget, others, now, ask_slurm=False).committed == NOTHING
    assert read_budget_status(budget, mine, now, ask_slurm=False).num_queued == 1, "perhaps its own"
    budget_file(root, "gpu_hours: 1\naccount: lab\n")
    assert not check_submission(root, [run_of(100)], account="lab", ask_slurm=False).allowed
    said = check_submission(root, [run_of(100)], account="theirs", ask_slurm=False)
    assert said.allowed
    assert "is of account lab, and this is charged to theirs" in said.warnings[0]


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
    finally:
        idle_cluster.run([*change, "GrpTRESMins=gres/gpu=-1,cpu=-1"])
