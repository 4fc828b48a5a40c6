"""report: GPU-hours of runs and of what sacct printed, and two runs compared."""

import csv
import io
import json
import os
import socket
import time
from pathlib import Path

import pytest

from r1hpc import report, status
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from tests.cluster import Cluster
from tests.commands.commands import as_json, as_text, submit_recorded, wait_until
from tests.recorded import EPOCH, RecordedRun, bytes_read

HEADER = "JobID|User|Account|Partition|QOS|State|Start|End|ElapsedRaw|AllocTRES|JobName"


def test_report_of_a_finished_run(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    start = EPOCH + 5
    finished.gpu_ticks(start, 40, source="stub")
    shown = as_json(report, ["demo", "--plots"], capsys)
    (run,) = shown["runs"]
    assert run["steps"] == {"useful": 40, "lost": 10, "last": 40}
    assert run["data"]["exactly_once"] is True
    time_of = run["time"]
    assert (time_of["startup_s"], time_of["useful_s"], time_of["lost_s"]) == (20.0, 40.0, 10.0)
    assert time_of["save_s"] == 5.0
    assert sum(time_of[key] for key in time_of if key != "wall_s") == pytest.approx(time_of["wall_s"])
    hours = shown["gpu_hours"]
    assert hours["source"] == "run"
    assert hours["total"] == pytest.approx(4 * time_of["wall_s"] / 3600)
    assert hours["by_account"] == {"unknown": pytest.approx(hours["total"])}
    assert set(hours["by_state"]) == {"node_fail", "finished"}
    for group in ("by_user", "by_state", "by_day"):
        assert sum(hours[group].values()) == pytest.approx(hours["total"])
    assert sorted(Path(path).name for path in run["plots"]) == ["gpu.png", "loss.png", "throughput.png"]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in run["plots"])
    text = as_text(report, ["demo", "--no-plots"], capsys)
    assert "source=stub" in text
    assert "40 useful, 10 lost" in text
    assert "each exactly once" in text
    assert "\x1b" not in text


def test_a_later_report_does_not_read_the_gpus_again(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.gpu_ticks(EPOCH + 5, 3000)
    size = finished.run.gpu_metrics("n1").stat().st_size
    first = as_json(report, ["demo"], capsys)
    before = bytes_read()
    assert as_json(report, ["demo"], capsys) == first
    assert bytes_read() - before < size / 2
    assert first["runs"][0]["gpus"][0]["ticks"] == 3000


def test_report_of_a_cpu_run_without_a_driver(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(root / "demo")
    made.submit("local-1")
    made.attempt(1, 5, "finished", committed=5)
    made.no_driver("no NVIDIA driver here")
    text = as_text(report, [], capsys)
    assert "A CPU run" in text
    assert "no readings: no NVIDIA driver here" in text
    shown = as_json(report, ["--no-plots"], capsys)
    assert shown["gpu_hours"]["total"] == 0
    assert shown["gpu_hours"]["node_hours"] == pytest.approx(17 / 3600)


def test_report_of_a_run_that_has_not_begun(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RecordedRun(root / "demo").submit("4711", "slurm")
    text = as_text(report, [], capsys)
    assert "No attempt has begun" in text
    assert "no ledger yet" in text
    assert "A CPU run" not in text, "nobody knows that yet"


def test_an_attempt_without_an_end_counts_until_its_last_word(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(root / "demo", gpus=8)
    made.submit(f"local-{os.getpid()}")
    made.begin(host=socket.gethostname())
    made.steps(1, 20)
    shown = as_json(report, ["--no-plots"], capsys)
    assert shown["runs"][0]["state"] == "failed"
    assert shown["gpu_hours"]["total"] == pytest.approx(8 * 30 / 3600)


def test_a_ledger_with_a_gap_is_reported(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    finished.consume(44)
    text = as_text(report, ["--no-plots"], capsys)
    assert "NOT exactly once: steps missing from the ledger: 41-43" in text


def test_sacct_beside_the_runs_own_record(
    finished: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = as_json(report, ["--no-plots"], capsys)["runs"][0]["attempts"]
    tres = "billing=4,cpu=4,gres/gpu:a100=4,gres/gpu=4,node=2"
    lasted = [round(each["end"] - each["start"]) for each in own]
    began = [round(each["start"]) - 3 for each in own]
    rows = [
        f"4711|ada|lab|gpu|normal|NODE_FAIL|{began[0]}|Unknown|{lasted[0] + 3}|{tres}|demo",
        f"4711|ada|lab|gpu|normal|COMPLETED|{began[1]}|Unknown|{lasted[1] + 5}|{tres}|demo",
        f"9999|eve|lab|gpu|normal|COMPLETED|{began[0]}|Unknown|3600|{tres}|demo",
    ]
    file = _sacct_file(tmp_path, *rows)
    sacct = ["demo", "--no-plots", "--sacct-file", file]
    shown = as_json(report, sacct, capsys)
    run = shown["runs"][0]
    assert run["gpu_hours"]["source"] == "sacct"
    assert shown["gpu_hours"]["by_user"].keys() == {"ada"}
    more = run["gpu_hours"]["total"] - run["own_gpu_hours"]["total"]
    assert f"{more:+10,.3f}  difference: before and after its attempts" in as_text(report, sacct, capsys)


def test_gpus_that_came_with_whole_nodes_are_idle(
    finished: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = as_json(report, ["--no-plots"], capsys)["runs"][0]["attempts"]
    asked = own[0]["gpus"]
    tres = f"gres/gpu={2 * asked},node=2"
    times = [(round(each["start"]), round(each["end"] - each["start"])) for each in own]
    rows = [f"4711|ada|lab|gpu|normal|COMPLETED|{start}|Unknown|{s}|{tres}|demo" for start, s in times]
    sacct = ["demo", "--no-plots", "--sacct-file", _sacct_file(tmp_path, *rows)]
    run = as_json(report, sacct, capsys)["runs"][0]
    total = run["gpu_hours"]["total"]
    assert total == pytest.approx(2 * run["own_gpu_hours"]["total"], rel=0.05)
    assert sum(each["gpu_hours"] for each in run["attempts"]) == pytest.approx(total, rel=0.01)
    said = " ".join(as_text(report, sacct, capsys).split())
    assert "of GPUs of its nodes that it did not ask for" in said
    for each in run["allocations"]:
        assert each["split"]["idle"] >= each["split"]["allocated"] / 2


def _sacct_file(folder: Path, *rows: str, header: str = HEADER) -> str:
    file = folder / "records.txt"
    file.write_text("\n".join([header, *rows]) + "\n")
    return str(file)


def test_rows_set_aside_and_shards_of_unknown_size_are_shown(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    time_ = "2026-05-01T02:00:00|2026-05-01T03:00:00|3600"
    file = _sacct_file(
        tmp_path,
        f"7|ada|lab|gpu|normal|COMPLETED|{time_}|gres/gpu:a100_3g.20gb=7|a",
        f"8|ada|lab|gpu|normal|COMPLETED|{time_}|gres/shard=2|first line",
        "of a name",
        f"9|ada|lab|gpu|normal|COMPLETED|{time_}|cpu=4, gres/gpu=8|a",
    )
    text = " ".join(as_text(report, ["--sacct-file", file], capsys).split())
    assert "2 rows are set aside and not counted" in text
    assert "gres/shard count as no GPU: tell how many make one with --gres-per-gpu shard=N" in text
    hours = as_json(report, ["--sacct-file", file, "--gres-per-gpu", "shard=4"], capsys)["gpu_hours"]
    assert hours["by_gpu_type"] == {"a100_3g.20gb": 3, "shard": 0.5}
    assert hours["set_aside"]["rows"] == 2
    assert hours["by_month"] == {"2026-05": 3.5}
    with pytest.raises(UsageError, match="write it as shard=4"):
        report.main(["--sacct-file", file, "--gres-per-gpu", "shards=4"])


def test_hours_by_several_keys(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a head of a group asks: who used how much, of which GPUs, and how it ended."""
    header = f"{HEADER.removesuffix('JobName')}Submit|JobName"
    file = _sacct_file(
        tmp_path,
        "7|ada|lab|gpu|normal|REQUEUED|2026-05-31T23:00:00||10800|gres/gpu:a100=2|2026-05-31T22:59:00|a|b",
        "7|ada|lab|gpu|normal|COMPLETED|2026-06-02T02:00:00||3600|gres/gpu:a100=2|2026-06-02T00:00:00|a|b",
        "8|bob|lab|long|high|NODE_FAIL|2026-06-02T02:00:00||7200|gres/gpu:h100=8|2026-06-02T02:00:00|a",
        header=header,
    )
    by = ["--sacct-file", file, "--by"]
    found = as_json(report, [*by, "user", "month"], capsys)
    assert found["by"] == ["user", "month"]
    assert [(each["user"], each["month"], each["gpu_hours"]) for each in found["groups"]] == [
        *(("bob", "2026-06", 16), ("ada", "2026-05", 2), ("ada", "2026-06", 6)),
    ]
    assert found["gpu_hours"] == {"total": 24, "node_hours": 0, "source": "sacct"}
    assert as_json(report, [*by, "user,month"], capsys) == found
    lines = as_text(report, [*by, "cause"], capsys).splitlines()
    assert lines[0].split() == ["cause", "GPU-hours", "share", "starts", "median", "wait", "P90", "wait"]
    assert lines[1].split() == ["node_fail", "16.00", "66.7%", "1", "0.0", "s", "0.0", "s"]
    assert [line.split()[0] for line in lines[2:]] == ["preempted", "completed", "all"]
    assert report.main([*by, "gpu", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(each["gpu"], each["gpu_hours"], each["starts"]) for each in rows] == [
        ("h100", "16.0", "1"),
        ("a100", "8.0", "2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "usr"], r"--by has no key 'usr' \(did you mean 'user'\?\): choose among user, account,"),
        (["--by", "user,"], "--by has no key ''"),
        (["demo", "--by", "user"], "leave RUN_DIR and html out"),
        (["--by", "user", "--format", "html"], "leave RUN_DIR and html out"),
        (["--compare", "a", "b", "--by", "user"], "leave RUN_DIR and html out"),
        (["--by", "user"], "give --sacct-file FILE"),
    ],
)
def test_keys_that_cannot_be_summed_by(root: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(R1hpcError, match=words):
        report.main(arguments)


@pytest.mark.parametrize("copies", [1, 2000], ids=["few rows", "read by columns"])
def test_billing_stands_beside_gpu_hours(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], copies: int
) -> None:
    """TRESBillingWeights: a whole node of 8 GPUs may cost as much as its memory."""
    time_ = "2026-05-01T02:00:00|2026-05-01T03:00:00|3600"
    rows = [
        row
        for job in range(0, 3 * copies, 3)
        for row in (
            f"{job}|ada|lab|gpu|normal|COMPLETED|{time_}|billing=12,cpu=4,gres/gpu=8|a",
            f"{job + 1}|bob|lab|gpu|normal|COMPLETED|{time_}|billing=30,cpu=4|a",
            f"{job + 2}|bob|lab|gpu|normal|COMPLETED|{time_}|cpu=4,gres/gpu=1|a",
        )
    ]
    file = _sacct_file(tmp_path, *rows)
    hours = as_json(report, ["--sacct-file", file], capsys)["gpu_hours"]
    assert hours["billing_hours"] == 42 * copies
    assert hours["billing_by_user"] == {"ada": 12 * copies, "bob": 30 * copies}
    assert hours["billing_by_account"] == {"lab": 42 * copies}
    assert hours["total"] == 9 * copies
    assert f"billing TRES-hours: {42 * copies:,.2f}" in as_text(report, ["--sacct-file", file], capsys)
    (tmp_path / "records.txt").write_text(Path(file).read_text().replace("billing", "other"))
    assert "billing_hours" not in as_json(report, ["--sacct-file", file], capsys)["gpu_hours"]


def test_hours_of_a_file_are_split_at_midnight_and_by_every_key(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _sacct_file(
        tmp_path,
        # Two attempts of one job: without both the first one's hours are missing.
        "7|ada|lab|gpu|normal|PREEMPTED|2026-05-01T22:00:00|2026-05-02T01:00:00|10800|gres/gpu:a100=8,gres/gpu=8|a",
        "7|ada|lab|gpu|normal|COMPLETED|2026-05-02T02:00:00|2026-05-02T03:00:00|3600|gres/gpu=8|a",
        "8|bob|lab|gpu|high|RUNNING|2026-05-02T02:00:00|Unknown|1800|gres/gpu:h100=2|na|me",
        "9|bob|phy|cpu|high|CANCELLED by 1000|2026-05-02T02:00:00|2026-05-02T02:30:00|1800|cpu=8|x",
        "10|bob|phy|gpu|high|PENDING|Unknown|Unknown|0||x",
        "7.batch|||||COMPLETED|2026-05-02T02:00:00|2026-05-02T03:00:00|3600|gres/gpu=8|batch",
        HEADER,
        "7|ada|lab|gpu|normal|COMPLETED|2026-05-02T02:00:00|2026-05-02T03:00:00|3600|gres/gpu=8|a",
    )
    hours = as_json(report, ["--sacct-file", file], capsys)["gpu_hours"]
    assert hours["total"] == pytest.approx(33)
    assert hours["by_day"] == {"2026-05-01": pytest.approx(16), "2026-05-02": pytest.approx(17)}
    assert hours["by_user"] == {"ada": pytest.approx(32), "bob": pytest.approx(1)}
    assert hours["by_state"] == {"CANCELLED": 0, "COMPLETED": 8, "PREEMPTED": 24, "RUNNING": 1}
    assert hours["by_qos"] == {"high": 1, "normal": 32}
    assert hours["by_partition"] == {"cpu": 0, "gpu": 33}
    assert hours["by_account"] == {"lab": 33, "phy": 0}
    one = as_json(report, ["--sacct-file", file, "--user", "bob"], capsys)["gpu_hours"]
    assert one["total"] == pytest.approx(1)
    for accounts, total in (("phy", 0), ("phy,LAB", 33)):  # as sacct takes them
        some = as_json(report, ["--sacct-file", file, "--account", accounts], capsys)["gpu_hours"]
        assert some["total"] == pytest.approx(total)
    window = ["--start", "2026-05-02", "--end", "2026-05-02T02:30:00"]
    assert as_json(report, ["--sacct-file", file, *window], capsys)["gpu_hours"]["total"] == pytest.approx(13)
    assert "2026-05-01" in as_text(report, ["--sacct-file", file], capsys)
    assert report.main(["--sacct-file", file, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {"group": "user", "key": "ada", "gpu_hours": "32.0"} in rows


def test_columns_may_come_in_any_order_and_form(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "AllocTRES|JobName|Elapsed|State|Start|JobID"
    row = "gres/gpu=4|a|b|1-00:30:00|COMPLETED|2026-05-01T00:00:00|7_3"
    file = _sacct_file(tmp_path, row, header=header)
    assert as_json(report, ["--sacct-file", file], capsys)["gpu_hours"]["total"] == pytest.approx(98)
    file = _sacct_file(tmp_path, row + "|", header=header.replace("JobName|", "") + "|")
    with pytest.raises(StateError, match="has 8 fields and its header 6"):
        report.main(["--sacct-file", file])
    # A separator in the name, and the last column empty.
    row = "7|a|b|2026-05-01T00:00:00|gres/gpu=4|3600|"
    file = _sacct_file(tmp_path, row, header="\ufeffJobID|JobName|Start|AllocTRES|ElapsedRaw|QOS")
    assert as_json(report, ["--sacct-file", file], capsys)["gpu_hours"]["total"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("header", "row", "reason"),
    [
        ("JobID|Start|ElapsedRaw", "7|2026-05-01T00:00:00|1", "no column AllocTRES"),
        (HEADER, "7|ada|lab", r"records.txt:2 has 3 fields"),
        ("JobID|Start|ElapsedRaw|AllocTRES", "7|yesterday|1|", r"records.txt:2: 'yesterday' is not a time"),
        ("JobID|Start|ElapsedRaw|AllocTRES", "7|2026-05-01|many|", r"records.txt:2: ElapsedRaw is 'many'"),
        ("JobID|Start|ElapsedRaw|AllocTRES", "7|9999999999999999|1|", "is not a time"),
        ("JobID|Start|Elapsed|AllocTRES", "7|2026-05-01|99999999-00:00:00|", "over 49,711 days"),
        ("JobID|Start|ElapsedRaw|AllocTRES", "7|2026-05-01|-5|", "no time that a job ran"),
        ("", "", "no column JobID"),
    ],
)
def test_a_file_that_sacct_did_not_print_is_refused(
    root: Path, tmp_path: Path, header: str, row: str, reason: str
) -> None:
    with pytest.raises(StateError, match=reason):
        report.main(["--sacct-file", _sacct_file(tmp_path, row, header=header)])


def test_compare_is_a_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = RecordedRun(root / "a"), RecordedRun(root / "b")
    a.attempt(1, 20, "finished", committed=20)
    b.attempt(1, 12, "crash", committed=10)
    b.attempt(11, 20, "finished", committed=20)
    assert "the same to the bit" in as_text(report, ["--compare", "a", "b"], capsys)
    text = a.run.train_metrics.read_text()
    for run in (a.run, b.run):
        lines = [json.loads(line) for line in run.train_metrics.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key != "grad_norm"} for line in lines]
        run.train_metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
    said = as_text(report, ["--compare", "a", "b"], capsys)
    assert "loss, lr of all 20 steps" in said
    assert "not compared, since neither recorded it: grad_norm" in said
    a.run.train_metrics.write_text(text)
    b.run.train_metrics.write_text(text)
    b.begin()
    b.steps(21, 21)
    assert report.main(["--compare", "a", "b", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["differences"] == [{"global_step": 21, "key": "global_step", "a": "-", "b": "attempt 3"}]
    assert report.main(["--compare", "a", "b", "--format", "csv"]) == 1
    assert capsys.readouterr().out == "global_step,key,a,b\n21,global_step,-,attempt 3\n"
    with pytest.raises(UsageError, match="leave RUN_DIR out"):
        report.main(["a", "--user", "ada"])
    for odd in ("\N{SUPERSCRIPT TWO}", "9" * 30):
        with pytest.raises(UsageError, match="is not a time"):
            report.main(["--start", odd])
    with pytest.raises(UsageError, match="makes no page: leave out --out"):
        report.main(["--compare", "a", "b", "--format", "html"])
    with pytest.raises(UsageError, match="two run folders"):
        report.main(["--compare", "a"])


@pytest.mark.slurm
def test_a_requeued_job_is_requeued_and_every_attempt_is_charged(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(tmp_path / "runs" / "demo")
    node = on_cluster.node_names[0]
    job_id = submit_recorded(on_cluster, made, "--gres=gpu:2", f"--nodelist={node}")
    on_cluster.wait_job(job_id, {"RUNNING"})
    made.clock = time.time()  # a fresh cluster takes seconds to start its first job
    made.begin()
    time.sleep(2)  # Slurm counts whole seconds: an attempt shorter than one is charged nothing
    with on_cluster.drained(node):  # it cannot begin again before it was looked at
        on_cluster.run(["scontrol", "requeue", str(job_id)])
        on_cluster.wait_job(job_id, {"PENDING"})
        assert as_json(status, [], capsys)["state"] == "requeued"
    on_cluster.wait_restarts(job_id, 1)
    on_cluster.wait_job(job_id, {"RUNNING"})
    time.sleep(2)
    on_cluster.cancel(job_id)
    on_cluster.wait_job(job_id)
    wait_until(lambda: len(on_cluster.sacct(job_id)) == 2, 60)
    shown = as_json(report, ["--no-plots"], capsys)
    assert shown["gpu_hours"]["source"] == "sacct"
    assert set(shown["gpu_hours"]["by_state"]) >= {"REQUEUED"}
    assert shown["gpu_hours"]["total"] > 0
    live = as_json(report, ["--start", "2026-01-01"], capsys)
    assert live["gpu_hours"]["total"] >= shown["gpu_hours"]["total"]
