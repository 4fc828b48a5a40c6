"""status, logs, cancel and report on recorded run folders, with real processes where a process matters."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from r1hpc import cancel, logs, report, status
from r1hpc.attempt import rank_logs
from r1hpc.attempt.cancel import cancel_job, check_is_ours
from r1hpc.attempt.state import State, look
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.files import read_records
from r1hpc.telemetry.hours import split_days
from tests.cluster import Cluster
from tests.recorded import EPOCH, RecordedRun

STATUS_KEYS = {"attempt", "cause", "start", "end", "nodes", "gpus", "first_step", "last_step"}
HEADER = "JobID|User|Account|Partition|QOS|State|Start|End|ElapsedRaw|AllocTRES|JobName"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run root, in a place without Slurm and a fixed time zone."""
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def _restore_time_zone() -> Iterator[None]:
    yield
    time.tzset()


@pytest.fixture
def finished(root: Path) -> RecordedRun:
    """Two attempts, ten steps lost between them."""
    made = RecordedRun(root / "demo", gpus=4, nodes=2)
    made.submit("4711", "slurm")
    made.attempt(1, 25, "node_fail", committed=15, detail="a node went\x1b[31m down", save_every=5)
    made.attempt(16, 40, "finished", committed=40, save_every=5)
    made.checkpoint(40)
    return made


def as_json(command: Any, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command.main([*argv, "--json"]) in (0, 1)
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one object and nothing else"
    value: dict[str, Any] = json.loads(out)
    return value


def as_text(command: Any, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.strip().startswith("/")) <= 100
    return out


# All commands


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "report"])
def test_a_command_is_light_and_answers_a_wrong_flag_with_the_right_one(verb: str, tmp_path: Path) -> None:
    heavy = "'torch', 'deepspeed', 'transformers', 'zarr', 'matplotlib', 'submitit'"
    code = f"import sys, r1hpc.{verb}; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    argv = [sys.executable, "-m", f"r1hpc.{verb}", "--run-rot", str(tmp_path)]
    wrong = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--run-root" in wrong.stderr
    nothing = subprocess.run(
        [*argv[:3], "--run-root", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "R1HPC_RUN_ROOT" in nothing.stderr
    assert "Traceback" not in nothing.stderr


def test_without_a_run_dir_the_newest_run_is_meant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, name in ((20, "old"), (10, "new")):
        made = RecordedRun(root / name)
        os.utime(made.run.config, (time.time() - age, time.time() - age))
    assert as_json(status, [], capsys)["run_id"] == "new"
    assert as_json(status, ["old"], capsys)["run_id"] == "old"
    assert as_json(status, ["old", "--run-root", str(root)], capsys)["run_id"] == "old"
    assert [r["run_id"] for r in as_json(status, ["--all"], capsys)["runs"]] == ["new", "old"]
    with pytest.raises(UsageError, match="no run at"):
        status.main(["nowhere"])


def test_a_run_folder_that_others_may_write_is_refused(finished: RecordedRun) -> None:
    finished.run.path.chmod(0o777)
    with pytest.raises(StateError, match="chmod go-w"):
        status.main(["demo"])


# status


def test_status_of_a_finished_run(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    shown = as_json(status, ["demo"], capsys)
    assert shown["state"] == "finished"
    assert (shown["attempt"], shown["global_step"], shown["num_steps"]) == (2, 40, 40)
    assert (shown["last_committed_step"], shown["job_id"], shown["executor"]) == (40, "4711", "slurm")
    assert shown["tokens_per_second"] == 128.0
    assert shown["eta_s"] is None
    assert [a["cause"] for a in shown["attempts"]] == ["node_fail", "finished"]
    assert STATUS_KEYS | {"last_committed_step"} <= set(shown["attempts"][0])
    seconds = sum(a["end"] - a["start"] for a in shown["attempts"])
    assert shown["gpu_hours"] == pytest.approx(4 * seconds / 3600)
    text = as_text(status, ["demo"], capsys)
    assert "demo: finished" in text
    assert "\x1b" not in text


def test_status_before_the_first_attempt(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(root / "demo")
    assert as_json(status, [], capsys)["state"] == "unknown"
    made.submit("4711", "slurm")
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["attempt"], shown["attempts"]) == ("queued", None, [])
    assert "as of the run folder" in shown["detail"]
    assert "no checkpoint yet" in as_text(status, [], capsys)


@pytest.mark.parametrize(
    ("cause", "requeued", "state"),
    [
        ("preempted", True, "requeued"),
        ("preempted", False, "failed"),
        ("crash", False, "failed"),
        ("stopped", False, "stopped"),
        ("cancelled", False, "cancelled"),
        ("refused", False, "failed"),
    ],
)
def test_state_after_an_attempt(root: Path, cause: str, requeued: bool, state: str) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.begin()
    made.steps(1, 3)
    made.end(cause, 3, requeued=requeued)
    assert look(made.run).state == state


def test_a_new_submission_after_the_end_is_queued_although_its_line_came_late(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.attempt(1, 3, "crash")
    made.submit("4712", "slurm")
    assert look(made.run).state is State.queued
    submitted_at = made.clock - 5
    made.job_id = "4713"
    made.begin()
    made.clock = submitted_at
    made.submit("4713", "slurm")  # written after its begin, dated before it
    assert look(made.run).state is State.running


def test_a_resumed_attempt_stands_where_it_resumed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.attempt(1, 20, "crash", committed=15)
    made.begin(resumed_from=15)
    assert as_json(status, [], capsys)["global_step"] == 15


def test_a_torn_last_line_and_a_foreign_config_do_not_stop_status(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with finished.run.train_metrics.open("ab") as file:
        file.write(b'{"global_step": 41, "attempt": 2, "lo')
    with finished.run.attempts.open("ab") as file:
        file.write(b'{"event": "beg')
    finished.run.config.write_text("of: another\nversion: 9\n")
    shown = as_json(status, [], capsys)
    assert (shown["global_step"], shown["num_steps"], shown["state"]) == (40, None, "finished")


def test_watch_ends_with_the_run(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--watch"]) == 0
    assert capsys.readouterr().out.count("demo: finished") == 1
    with pytest.raises(UsageError, match="leave --json"):
        status.main(["--watch", "--json"])


# A local supervisor, played by a process that is started with the run folder as its argument

SUPERVISOR = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit(7)))
print("ready", flush=True)
while True: signal.pause()
"""


@pytest.fixture
def supervised(root: Path) -> Iterator[tuple[RecordedRun, "subprocess.Popen[str]"]]:
    made = RecordedRun(root / "demo", num_steps=40)
    command = [sys.executable, "-c", SUPERVISOR, str(made.run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    made.submit(f"local-{process.pid}")
    made.begin(host=socket.gethostname())
    made.steps(1, 20)
    yield made, process
    process.kill()
    process.wait()


Supervised = tuple[RecordedRun, "subprocess.Popen[str]"]


def test_a_living_supervisor_is_running_and_a_dead_one_has_failed(
    supervised: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    _, process = supervised
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["eta_s"]) == ("running", 20.0)
    process.kill()
    process.wait()
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["eta_s"]) == ("failed", None)
    assert str(process.pid) in shown["detail"]


def test_a_reused_pid_is_not_the_supervisor(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit(f"local-{os.getpid()}")
    made.begin(host=socket.gethostname())
    assert look(made.run).state is State.failed
    with pytest.raises(StateError, match="not demo's"):
        cancel_job(made.run, look(made.run))


def test_a_run_on_another_host_is_left_to_that_host(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit("local-1")
    made.begin(host="elsewhere")
    situation = look(made.run)
    assert situation.state is State.running
    assert "elsewhere" in situation.detail
    with pytest.raises(StateError, match="cancel it there"):
        cancel.main([])


def test_cancel_terminates_the_supervisor_and_leaves_word(
    supervised: Supervised, capsys: pytest.CaptureFixture[str]
) -> None:
    made, process = supervised
    assert as_json(cancel, [], capsys)["action"] == "sigterm"
    assert process.wait(10) == 7
    assert read_records(made.run.attempts)[-1]["event"] == "cancel_requested"
    assert look(made.run).state is State.cancelled
    assert as_json(cancel, [], capsys)["action"] == "none"


def test_save_first_only_touches_stop(supervised: Supervised, capsys: pytest.CaptureFixture[str]) -> None:
    made, process = supervised
    assert "saves after the step under way" in as_text(cancel, ["--save-first"], capsys)
    assert made.run.stop.exists()
    assert process.poll() is None
    assert look(made.run).state is State.running


def test_a_finished_run_is_not_cancelled(finished: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.run.attempts.read_bytes()
    assert "finished already" in as_text(cancel, ["demo"], capsys)
    assert finished.run.attempts.read_bytes() == before


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("JobId=7 JobName=demo UserId=mallory(4242) Command=/x/demo/job.sh", "not yours"),
        ("JobId=7 JobName=other UserId=me({uid}) Command=/x/demonstration/job.sh", "does not name demo"),
        ("", "not yours"),
    ],
)
def test_a_job_of_another_user_or_run_is_never_cancelled(root: Path, shown: str, reason: str) -> None:
    made = RecordedRun(root / "demo")
    made.submit("7", "slurm")
    job = look(made.run).job
    assert job is not None
    with pytest.raises(StateError, match=reason):
        check_is_ours(made.run, job, shown.format(uid=os.getuid()))
    check_is_ours(made.run, job, f"JobId=7 UserId=me({os.getuid()}) Command={made.run.script} WorkDir=/home")


def test_cancel_says_what_to_do_where_there_is_no_slurm(root: Path) -> None:
    RecordedRun(root / "demo").submit("7", "slurm")
    with pytest.raises(R1hpcError, match="login node"):
        cancel.main([])


# logs


def test_logs_shows_the_end_of_the_last_attempt(
    finished: RecordedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_text(logs, ["demo", "-n", "2"], capsys) == "step 39\nstep 40\n"
    assert as_text(logs, ["demo", "--attempt", "1", "-n", "1"], capsys) == "step 25\n"
    assert len(as_json(logs, ["demo"], capsys)["lines"]) == 25
    assert logs.main(["demo", "-n", "0"]) == 0
    assert capsys.readouterr().out == ""


def test_attempts_are_numbered_from_1(finished: RecordedRun) -> None:
    with pytest.raises(UsageError, match="numbered from 1"):
        logs.main(["demo", "--attempt", "0"])


def test_a_folder_of_the_same_name_here_does_not_hide_the_run(
    finished: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    given = ["demo", "--run-root", str(finished.run.path.parent)]
    assert as_json(status, given, capsys)["run_dir"] == str(finished.run.path)


@pytest.mark.parametrize("every", ["0", "-1", "inf", "nan"])
def test_watch_refuses_a_period_that_is_none(finished: RecordedRun, every: str) -> None:
    with pytest.raises(UsageError, match="--every"):
        status.main(["demo", "--watch", "--every", every])


def test_a_missing_log_names_those_that_there_are(finished: RecordedRun) -> None:
    with pytest.raises(StateError, match=r"there are ranks 0$"):
        logs.main(["demo", "--rank", "3"])
    with pytest.raises(StateError, match="logs of attempts 1, 2"):
        logs.main(["demo", "--attempt", "9"])


def test_logs_before_the_first_attempt_points_at_the_supervisor(root: Path) -> None:
    made = RecordedRun(root / "demo")
    (made.run.logs / "local.out").write_text("building the dataset\n")
    with pytest.raises(StateError, match=r"logs/local\.out"):
        logs.main([])


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07text", "text"),
        (b"10%\r50%\r100%\r", "100%"),
        (b"a\x00b\x08c\x9b", "abc\N{REPLACEMENT CHARACTER}"),
        (b"tab\tstays", "tab\tstays"),
        ("bidi\u202etxt".encode(), "biditxt"),
        (b"\x1b", ""),
    ],
)
def test_a_log_cannot_drive_the_terminal(raw: bytes, shown: str) -> None:
    assert rank_logs.clean(raw) == shown


def test_a_long_log_is_read_from_its_end(finished: RecordedRun) -> None:
    path = finished.run.rank_log(2, 0)
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(50_000)) + b"unfinished")
    assert rank_logs.tail(path, 2) == [b"line 49999", b"unfinished"]
    assert len(rank_logs.tail(path, 30_000)) == 30_000


def test_follow_goes_on_with_the_next_attempt_until_the_end(root: Path) -> None:
    made = RecordedRun(root / "demo")
    made.submit("4711", "slurm")
    made.begin()
    made.log("one")
    made.log("two")
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(rank_logs.follow(made.run, 0, None, 1)))
    reader.start()
    _wait(lambda: reader.is_alive())
    time.sleep(0.5)
    made.log("three")
    made.end("preempted")
    made.begin()
    made.log("four")
    time.sleep(0.8)
    with made.run.rank_log(2, 0).open("a") as file:
        file.write("fi")
        file.flush()
        time.sleep(0.5)
        file.write("ve\nunfinished")
    made.end("finished", 2)
    reader.join(15)
    assert not reader.is_alive()
    assert seen == ["two", "three", "==> attempt 2, rank 0 <==", "four", "five", "unfinished"]


# report


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
    gap = run["gap_gpu_hours"]
    assert gap["before"] == pytest.approx(4 * 6 / 3600, abs=0.002)
    assert sum(gap.values()) == pytest.approx(run["gpu_hours"]["total"] - run["own_gpu_hours"]["total"])
    assert "before the attempts began" in as_text(report, sacct, capsys)


def _sacct_file(folder: Path, *rows: str, header: str = HEADER) -> str:
    file = folder / "records.txt"
    file.write_text("\n".join([header, *rows]) + "\n")
    return str(file)


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
        ("JobID|Start|Elapsed|AllocTRES", "7|2026-05-01|99999999-00:00:00|", "no time that a job ran"),
        ("JobID|Start|ElapsedRaw|AllocTRES", "7|2026-05-01|-5|", "no time that a job ran"),
        ("", "", "no column JobID"),
    ],
)
def test_a_file_that_sacct_did_not_print_is_refused(
    root: Path, tmp_path: Path, header: str, row: str, reason: str
) -> None:
    with pytest.raises(StateError, match=reason):
        report.main(["--sacct-file", _sacct_file(tmp_path, row, header=header)])


def test_days_of_23_and_25_hours(root: Path) -> None:
    spring = split_days(1774652400.0, 1774652400.0 + 3 * 86400)  # 2026-03-28T00:00 in Berlin
    assert [(day, s / 3600) for day, s in spring][:3] == [
        ("2026-03-28", 24),
        ("2026-03-29", 23),
        ("2026-03-30", 24),
    ]
    autumn = dict(split_days(1792792800.0, 1792792800.0 + 2 * 86400))  # 2026-10-24T00:00
    assert autumn["2026-10-25"] == pytest.approx(24 * 3600)
    assert sum(autumn.values()) == pytest.approx(2 * 86400)


def test_compare_is_a_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = RecordedRun(root / "a"), RecordedRun(root / "b")
    a.attempt(1, 20, "finished", committed=20)
    b.attempt(1, 12, "crash", committed=10)
    b.attempt(11, 20, "finished", committed=20)
    assert "the same to the bit" in as_text(report, ["--compare", "a", "b"], capsys)
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
    with pytest.raises(UsageError, match="two run folders"):
        report.main(["--compare", "a"])


def _wait(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


# A real Slurm


@pytest.fixture
def on_cluster(idle_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Slurm's commands talk to the test cluster, and runs lie under tmp_path/runs."""
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    for name, value in idle_cluster.env().items():
        monkeypatch.setenv(name, value)
    return idle_cluster


def _submitted(cluster: Cluster, made: RecordedRun, *options: str) -> int:
    made.run.script.write_text("#!/bin/bash\nexec sleep 300\n")
    argv = ["sbatch", "--parsable", "--output=/dev/null", *options, str(made.run.script)]
    job_id = int(cluster.run(argv).stdout)
    made.clock = time.time()
    made.submit(str(job_id), "slurm")
    made.clock = time.time()
    return job_id


@pytest.mark.slurm
def test_a_job_is_followed_by_its_states_and_cancelled(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(tmp_path / "runs" / "demo")
    job_id = _submitted(on_cluster, made, "--hold")
    shown = as_json(status, [], capsys)
    assert (shown["state"], shown["job_id"]) == ("queued", str(job_id))
    assert "PENDING (JobHeldUser)" in shown["detail"]
    on_cluster.run(["scontrol", "release", str(job_id)])
    on_cluster.wait_job(job_id, {"RUNNING"})
    made.begin()
    assert as_json(status, [], capsys)["state"] == "running"

    other = RecordedRun(tmp_path / "runs" / "other")
    other.submit(str(job_id), "slurm")
    with pytest.raises(StateError, match="does not name other"):
        cancel.main(["other"])
    assert on_cluster.state(job_id) == "RUNNING"

    assert as_json(cancel, ["demo"], capsys)["action"] == "scancel"
    assert on_cluster.wait_job(job_id) == "CANCELLED"
    assert as_json(status, ["demo"], capsys)["state"] == "cancelled"
    assert read_records(made.run.attempts)[-1]["event"] == "cancel_requested"


@pytest.mark.slurm
def test_a_requeued_job_is_requeued_and_every_attempt_is_charged(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RecordedRun(tmp_path / "runs" / "demo")
    job_id = _submitted(on_cluster, made, "--gres=gpu:2")
    on_cluster.wait_job(job_id, {"RUNNING"})
    made.begin()
    time.sleep(2)  # Slurm counts whole seconds: an attempt shorter than one is charged nothing
    on_cluster.run(["scontrol", "requeue", str(job_id)])
    on_cluster.wait_job(job_id, {"PENDING"})
    assert as_json(status, [], capsys)["state"] == "requeued"
    on_cluster.wait_restarts(job_id, 1)
    on_cluster.wait_job(job_id, {"RUNNING"})
    on_cluster.cancel(job_id)
    on_cluster.wait_job(job_id)
    _wait(lambda: len(on_cluster.sacct(job_id)) == 2)
    shown = as_json(report, ["--no-plots"], capsys)
    assert shown["gpu_hours"]["source"] == "sacct"
    assert set(shown["gpu_hours"]["by_state"]) >= {"REQUEUED"}
    assert shown["gpu_hours"]["total"] > 0
    live = as_json(report, ["--start", "2026-01-01"], capsys)
    assert live["gpu_hours"]["total"] >= shown["gpu_hours"]["total"]
