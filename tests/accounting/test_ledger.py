"""The ledger of a run, from recorded folders whose times were chosen, with and without sacct's records."""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc import report
from r1hpc.accounting.account import hours_of_runs, with_runs
from r1hpc.accounting.hours import Selection
from r1hpc.accounting.ledger import RunLedger
from r1hpc.accounting.open_ledger import open_ledger, open_ledgers, report_run
from r1hpc.base.choose_run import all_runs
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.reporting.text import ledger_text
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.diagnosis.timeline import Split
from tests.recorded import EPOCH, RecordedRun

GPUS = 8


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedRun:
    """Three attempts of one job: preempted, a node lost with five steps, finished. No sacct here."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = RecordedRun(tmp_path / "runs" / "demo", gpus=GPUS, nodes=2)
    run.submit("77", "slurm")  # and 5 s until the first attempt
    run.attempt(1, 20, "preempted", committed=20, save_every=10)  # 10 + 20 + 2 x 0.5 + 2 = 33 s
    run.attempt(21, 35, "node_fail", committed=30, save_every=10)  # 10 + 15 + 0.5 + 2 = 27.5 s
    run.attempt(31, 40, "finished", committed=40, save_every=10)  # 10 + 10 + 0.5 + 2 = 22.5 s
    return run


def record(job_id: str, start: float, elapsed_s: int, **fields: object) -> JobRecord:
    usual = JobRecord(
        job_id=job_id,
        state="COMPLETED",
        start=start,
        end=start + elapsed_s,
        elapsed_s=elapsed_s,
        gpus=GPUS,
        nodes=2,
        node_list="n[1-2]",
        exit_code="0:0",
        restarts=0,
        user="ada",
        account="lab",
        partition="gpu",
        qos="normal",
        job_name="demo",
        eligible=start - 60,
    )
    return replace(usual, **fields)  # type: ignore[arg-type]


def ledger_of(run: RunDir, records: Sequence[JobRecord] = (), **selected: float) -> RunLedger:
    ledger = open_ledger(run, time.time(), records)
    return ledger.selected(selected["start"], selected["end"]) if selected else ledger


def numbers(ledger: RunLedger) -> list[tuple[int, ...]]:
    """The attempts in each allocation."""
    return [tuple(each.attempt.attempt for each in cost.inside) for cost in ledger.attempts]


def three_records(made: RecordedRun) -> list[JobRecord]:
    """Each begins 3 s before its attempt, in whole seconds, and ends 4 s or so after."""
    starts = [EPOCH + 2, EPOCH + 37, EPOCH + 66]  # attempts begin at +5, +40 and +69.5
    return [record("77", start, elapsed) for start, elapsed in zip(starts, (34, 29, 30), strict=True)]


def test_without_accounting_the_run_folder_tells(made: RecordedRun) -> None:
    ledger = ledger_of(made.run)
    assert ledger.source == "run"
    assert ledger.split() == Split(useful=40_000, lost=5_000, startup=30_000, save=2_000, idle=6_000) * GPUS
    assert ledger.split().allocated == GPUS * 83_000
    assert ledger.queue_s == pytest.approx(5 + 2 + 2)
    text = ledger_text(ledger)
    assert "no sacct here" in text
    assert "steps done again" in text


def test_a_local_run_waits_in_no_queue(tmp_path: Path) -> None:
    """The stages of a local chain run in turn: the later ones wait for the others."""
    made = RecordedRun(tmp_path / "runs" / "a")
    made.submit("local-1")
    made.attempt(1, 5, "preempted", committed=5)
    made.attempt(6, 10, "finished", committed=10)
    ledger = ledger_of(made.run)
    assert [each.wait_s for each in ledger.attempts] == [None, None]
    assert ledger.queue_s == 0


def test_sacct_tells_what_was_held_and_the_run_what_for(made: RecordedRun) -> None:
    """What lies before the attempts is start-up, what lies after them is idle."""
    ledger = ledger_of(made.run, three_records(made))
    assert ledger.source == "sacct"
    assert numbers(ledger) == [(1,), (2,), (3,)]
    assert [entry.wall.allocated for entry in ledger.attempts] == [34_000, 29_000, 30_000]
    first, second, third = (entry.wall for entry in ledger.attempts)
    assert first == Split(useful=20_000, startup=13_000, save=1_000)
    # The second allocation ended 1.5 s before the attempt's last word.
    assert second == Split(useful=10_000, lost=5_000, startup=13_000, save=500, idle=500)
    assert third == Split(useful=10_000, startup=13_500, save=500, idle=6_000)
    assert ledger.split().allocated == GPUS * 93_000
    assert ledger.queue_s == 180


def test_what_holds_no_attempt_is_idle_and_what_waits_is_queue(made: RecordedRun) -> None:
    """A job that Slurm started once more after the end, and one that is still in the queue."""
    now = time.time()
    extra = [
        record("77", EPOCH + 200, 7, state="COMPLETED"),
        replace(record("77", EPOCH, 0, state="PENDING", eligible=now - 90, gpus=0), start=None, end=None),
        record("88", EPOCH + 5, 1000),
    ]
    ledger = ledger_of(made.run, three_records(made) + extra)
    assert ledger.attempts[-1].wall == Split(idle=7_000)
    assert ledger.attempts[-1].inside == ()
    assert ledger.split().allocated == GPUS * 100_000, "job 88 is not this run's"
    assert ledger.queue_s == pytest.approx(4 * 60 + 90, abs=5)


def test_an_attempt_that_sacct_does_not_know_counts_by_the_runs_own_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Job 100 lies before sacct's window; ten times as long as job 200, which is known."""
    made = RecordedRun(tmp_path / "runs" / "demo", gpus=GPUS, nodes=2)
    made.submit("100", "slurm")
    made.attempt(1, 20, "preempted", committed=20, step_s=1800)  # 10 + 36,000 + 2 s
    made.submit("200", "slurm")
    began = made.clock
    made.attempt(21, 40, "finished", committed=40, step_s=180)
    records = [record("200", began - 3, 3620)]
    found = report_run(made.run, time.time(), records)
    ledger = found.ledger
    assert ledger.source == "sacct and run"
    assert numbers(ledger) == [(1,), (2,)]
    assert ledger.split().allocated == GPUS * 1000 * (36_012 + 3_620)
    assert ledger.queue_s == pytest.approx(5 + 5), "nobody knows when the first job was eligible"
    answer = found.to_json()
    assert answer["gpu_hours"]["total"] == pytest.approx(GPUS * (36_012 + 3_620) / 3600)
    assert answer["note"].startswith("sacct has no record of attempt 1 (job 100)")
    assert "attempts it does not know, the run's own record" in ledger_text(ledger)
    dump = tmp_path / "dump.txt"
    dump.write_text(f"JobID|Start|ElapsedRaw|AllocTRES\n200|{began - 3:.0f}|3620|gres/gpu={GPUS}\n")
    argv = [str(made.run.path), "--sacct-file", str(dump)]
    assert as_json(capsys, *argv)["gpu_hours"]["source"] == "sacct and run"  # type: ignore[index]
    assert report.main(argv) == 0
    assert "sacct has no record of attempt 1 (job 100)" in " ".join(capsys.readouterr().out.split())


def test_without_the_records_before_a_requeue_those_attempts_still_count(made: RecordedRun) -> None:
    """What sacct prints without -D: the last record of the job alone."""
    ledger = ledger_of(made.run, three_records(made)[2:])
    assert ledger.source == "sacct and run"
    assert [entry.wall.allocated for entry in ledger.attempts] == [33_000, 27_500, 30_000]


def test_clocks_that_differ_by_seconds_count_nothing_twice(made: RecordedRun) -> None:
    late = [replace(each, start=(each.start or 0.0) + 8) for each in three_records(made)]
    ledger = ledger_of(made.run, late)
    assert ledger.source == "sacct"
    assert numbers(ledger) == [(1,), (2,), (3,)]


@pytest.mark.parametrize("skew", [-300, 300])
def test_a_batch_host_whose_clock_is_wrong_costs_no_useful_hours(made: RecordedRun, skew: int) -> None:
    """Each attempt is of the record that starts when its job did."""
    records = [replace(each, start=(each.start or 0.0) - skew) for each in three_records(made)]
    starts = iter(records)
    events = [json.loads(line) for line in made.run.attempts.read_text().splitlines()]
    for event in events:
        if event["event"] == "begin":
            event["job_start"] = next(starts).start
    made.run.attempts.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    ledger = ledger_of(made.run, records)
    assert ledger.source == "sacct"
    assert numbers(ledger) == [(1,), (2,), (3,)]
    assert [entry.wall.allocated for entry in ledger.attempts] == [34_000, 29_000, 30_000]
    assert [entry.wall.useful for entry in ledger.attempts] == [20_000, 10_000, 10_000]


def test_a_selection_of_time_cuts_allocations(made: RecordedRun) -> None:
    ledger = ledger_of(made.run, three_records(made), start=EPOCH + 10, end=EPOCH + 47)
    assert [entry.wall for entry in ledger.attempts] == [
        Split(useful=20_000, startup=5_000, save=1_000),
        Split(startup=10_000),
    ]


def test_a_selection_of_time_cuts_the_runs_own_record_alike(made: RecordedRun) -> None:
    """So that the two are compared over the same time, and what lies outside explains nothing."""
    ledger = ledger_of(made.run, three_records(made), start=EPOCH + 10, end=EPOCH + 47)
    own = sum(each.gpus * each.seconds for each in ledger.own)
    assert own == GPUS * (38 - 10 + 47 - 40)
    assert 3600 * ledger.gpu_hours - own == pytest.approx(GPUS * (3 - 2)), "all before the window is left out"


def test_where_slurm_counts_no_gpus_the_run_knows_how_many_it_had(
    made: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """AccountingStorageTRES without gres/gpu: AllocTRES has cpu, mem and node alone."""
    ledger = ledger_of(made.run, [replace(each, gpus=0) for each in three_records(made)])
    assert ledger.source == "sacct"
    assert ledger.gpu_hours == pytest.approx(GPUS * 93 / 3600)
    assert "AccountingStorageTRES lacks gres/gpu" in ledger.note
    dump = made.run.path.parent / "dump.txt"
    dump.write_text(f"JobID|Start|ElapsedRaw|AllocTRES\n9|{EPOCH:.0f}|3600|billing=4,cpu=4,node=1\n")
    where = ["--run-root", str(made.run.path.parent), "--sacct-file", str(dump)]
    assert "no job on Slurm's record has a GPU" in str(as_json(capsys, *where)["note"])
    assert report.main(where) == 0
    assert "AccountingStorageTRES has gres/gpu" in " ".join(capsys.readouterr().out.split())


def test_steps_that_ended_with_their_attempt_are_lost_before_they_are_taken_again(tmp_path: Path) -> None:
    """The run crashed for good: nothing beyond its checkpoint lasts."""
    made = RecordedRun(tmp_path / "demo", gpus=2)
    made.submit("41", "slurm")  # nobody can be asked: as of the folder it runs
    made.attempt(1, 25, "crash", committed=20)
    ledger = open_ledger(made.run, time.time())
    summary = ledger.summary
    assert (summary.num_useful, summary.num_lost) == (20, 5)
    assert (ledger.wall().useful, ledger.wall().lost) == (20_000, 5_000)
    made.begin(resumed_from=20)
    made.steps(21, 22)
    summary = open_ledger(made.run, time.time()).summary
    assert (summary.num_useful, summary.num_lost) == (22, 5), "what runs now may still be saved"


def test_what_a_killed_attempt_had_not_saved_is_lost(tmp_path: Path) -> None:
    """Its supervisor was killed with it: no end is on record, and no job is left that could go on."""
    made = RecordedRun(tmp_path / "demo", gpus=2)
    made.submit("local-1")  # process 1 is no supervisor of it
    made.begin()
    made.steps(1, 25, save_every=10)
    ledger = open_ledger(made.run, time.time())
    assert ledger.state == "failed"
    assert (ledger.summary.num_useful, ledger.summary.num_lost) == (20, 5)
    assert (ledger.wall().useful, ledger.wall().lost) == (20_000, 5_000)
    assert ledger.attempts[-1].cause == "unknown"
    assert [len(steps) for steps in ledger.summary.useful_steps().values()] == [20]


def ended_after_50_s(folder: Path, stage: str, cause: str) -> RecordedRun:
    """A run of a stage without optimizer steps, on one GPU."""
    made = RecordedRun(folder / "demo", gpus=1)
    made.run.config.write_text(made.run.config.read_text().replace("stage: pretrain", f"stage: {stage}"))
    made.submit("local-1")
    made.begin()
    made.clock += 50
    made.end(cause)
    return made


def test_a_stage_without_optimizer_steps_is_useful(tmp_path: Path) -> None:
    made = ended_after_50_s(tmp_path, "evaluate", "finished")
    ledger = ledger_of(made.run)
    assert (ledger.stage, ledger.split()) == ("evaluate", Split(useful=50_000))


def test_what_a_killed_attempt_had_begun_of_a_stage_in_parts_is_lost(tmp_path: Path) -> None:
    made = ended_after_50_s(tmp_path, "generate", "oom")
    assert ledger_of(made.run).split() == Split(lost=50_000), "it made nothing"
    made.begin()
    part = made.run.parts / "part-000000.jsonl"
    part.parent.mkdir()
    part.touch()
    os.utime(part, (made.clock + 30, made.clock + 30))
    made.clock += 50
    made.end("crash")
    assert ledger_of(made.run).split() == Split(useful=30_000, lost=70_000)


def test_a_cpu_run_is_told_in_node_hours(tmp_path: Path) -> None:
    made = RecordedRun(tmp_path / "demo", nodes=3)
    made.submit("local-1")
    made.attempt(1, 5, "finished", committed=5)
    ledger = ledger_of(made.run)
    assert ledger.split() == Split()
    assert ledger.node_split().allocated == 3 * 17_000
    assert "node-hours" in ledger_text(ledger)


def test_runs_of_a_root_without_sacct(made: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made.run.path.parent
    assert with_runs(Selection(), root).runs == {"77": ("demo", "pretrain")}
    hours = hours_of_runs([open_ledger(made.run, time.time())], Selection(start=EPOCH + 40))
    assert hours["total"] == pytest.approx(GPUS * 50 / 3600)
    assert hours["by_run"].keys() == {"demo"}
    assert hours["by_stage"].keys() == {"pretrain"}


def test_stages_of_chains_count_under_the_name_of_their_chain(tmp_path: Path) -> None:
    for number, chain in enumerate(("one", "two")):
        (tmp_path / chain).mkdir()
        (tmp_path / chain / "chain.yaml").touch()
        made = RecordedRun(tmp_path / chain / "sft", gpus=GPUS)
        made.submit(f"{number}", "slurm")
        made.attempt(1, 20, "finished", committed=20)
    made.run.config.write_bytes(b"\xff\x00")  # damaged since
    assert with_runs(Selection(), tmp_path).runs == {
        "0": ("one/sft", "pretrain"),
        "1": ("two/sft", "pretrain"),
    }
    hours = hours_of_runs(open_ledgers(all_runs(tmp_path), time.time())[0], Selection())
    assert hours["by_run"].keys() == {"one/sft", "two/sft"}


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert report.main([*argv, "--json"]) == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def test_the_report_says_where_the_hours_went(made: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    shown = as_json(capsys, str(made.run.path))
    split = shown["runs"][0]["split"]  # type: ignore[index]
    assert set(split) == {"useful", "lost", "startup", "save", "idle", "allocated", "queue_s"}
    spent = sum(split[part] for part in ("useful", "lost", "startup", "save", "idle"))
    assert spent == pytest.approx(split["allocated"], rel=1e-14)
    assert shown["split"] == split
    assert shown["gpu_hours"]["by_run"] == {"demo": pytest.approx(split["allocated"])}  # type: ignore[index]
    assert report.main([str(made.run.path)]) == 0
    assert "spent on" in capsys.readouterr().out


def test_the_report_sets_what_was_used_beside_the_plan(
    made: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    held = GPUS * 83 / 3600
    plan = {"p10": held / 4, "p50": held / 2, "p90": held}
    write_json(made.run.path / "estimate.json", {"gpu_hours": plan})
    assert as_json(capsys, str(made.run.path))["runs"][0]["planned"] == plan  # type: ignore[index]
    assert report.main([str(made.run.path)]) == 0
    assert (
        "planned 0.09222 GPU-hours (P10 0.04611, P90 0.1844); 200 % of that used" in capsys.readouterr().out
    )
    part = as_json(capsys, str(made.run.path), "--start", "2026-01-01")
    assert part["runs"][0]["planned"] is None, "a plan is of the whole run"  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--account lab", "is not on PATH: run this on a login node, or give --sacct-file FILE, made there"),
        ("--sacct-file nosuch", "there is no file nosuch; make it with: sacct -D -X -P"),
        ("--sacct-file /", "there is no file /"),
        ("--format html --run-root nosuch", "there is no folder"),
    ],
)
def test_a_report_that_cannot_be_made_says_how(made: RecordedRun, words: str, message: str) -> None:
    where = [] if "--run-root" in words else ["--run-root", str(made.run.path.parent)]
    with pytest.raises(R1hpcError, match=re.escape(message)):
        report.main([*words.split(), *where])
    assert not Path("nosuch").exists()


def test_without_sacct_the_report_of_all_jobs_comes_from_run_folders(
    made: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--run-root", str(made.run.path.parent), "--start", "2026-01-01")
    shown = as_json(capsys, *where)
    assert shown["gpu_hours"]["source"] == "run"  # type: ignore[index]
    assert shown["gpu_hours"]["total"] == pytest.approx(GPUS * 83 / 3600)  # type: ignore[index]
    assert "run folders" in str(shown["note"])
    assert report.main([*where]) == 0
    assert "alone: sacct is not on PATH" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("count", [1, 15_000])
@pytest.mark.parametrize(("flag", "column"), [("--user", "User"), ("--account", "Account")])
def test_a_dump_that_does_not_tell_whose_jobs_they_are_is_refused(
    made: RecordedRun, tmp_path: Path, flag: str, column: str, count: int
) -> None:
    dump = tmp_path / "dump.txt"
    lines = [f"{job}|{EPOCH:.0f}|3600|gres/gpu=1" for job in range(count)]
    dump.write_text("\n".join(["JobID|Start|ElapsedRaw|AllocTRES", *lines]) + "\n")
    where = ["--run-root", str(made.run.path.parent), "--sacct-file", str(dump)]
    for runs in ([], ["demo"]):
        with pytest.raises(R1hpcError, match=f"no column {column} in its first line; make it with: sacct"):
            report.main([*runs, *where, flag, "ada"])


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (("--start", "2026-05-01 10:00"), "-Suts1777629600"),
        (("--start", "2026-05-01T10:00:00+02:00"), "-Suts1777622400"),
        (("--start", "1777629600"), "-Suts1777629600"),
        (("--start", "2026-05-01", "--end", "1777629600"), "-Suts1777593600 -Euts1777629600"),
        # sacct itself would begin with today.
        ((), "-Suts1000000"),
        (("--end", "1777629600"), "-Suts1000000 -Euts1777629600"),
    ],
)
def test_sacct_is_asked_for_the_time_that_was_meant(
    asked: Sequence[str], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "sacct"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "JobID|Start|ElapsedRaw|AllocTRES|User"\n'
    )
    script.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        patch.setenv("TZ", "UTC")
        time.tzset()
        assert report.main([*asked, "--user", "ada", "--run-root", str(tmp_path)]) == 0
    time.tzset()
    assert f" {given} -uada" in (tmp_path / "asked").read_text()


def test_a_dump_knows_the_runs_of_the_root(
    made: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "dump.txt"
    lines = ["JobID|Start|ElapsedRaw|AllocTRES", f"77|{EPOCH:.0f}|3600|gres/gpu=2"]
    lines += [f"{job}|{EPOCH:.0f}|3600|gres/gpu=1" for job in range(100, 15_100)]
    for count in (4, len(lines)):  # read record by record, and by columns
        dump.write_text("\n".join(lines[:count]) + "\n")
        shown = as_json(capsys, "--sacct-file", str(dump), "--run-root", str(made.run.path.parent))
        assert shown["gpu_hours"]["by_run"] == {"demo": 2.0, "unknown": count - 2}  # type: ignore[index]
        assert shown["gpu_hours"]["by_stage"] == {"pretrain": 2.0, "unknown": count - 2}  # type: ignore[index]
