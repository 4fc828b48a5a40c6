"""Why no attempt begins: what a person must change is final and on record, what a node did is tried again."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1hpc import launch
from r1hpc.attempt import may_begin
from r1hpc.attempt.begin import begin, read_facts
from r1hpc.attempt.may_begin import MustNotGoOnError, NotTheNodeError
from r1hpc.attempt.state.state import JobReport, State, read_situation
from r1hpc.base import failpoints
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import read_records
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.fence import SupersededError
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config import load
from r1hpc.slurm import payload
from r1hpc.slurm.shell.contract import NOT_THE_NODE, OVER
from r1hpc.telemetry.records.attempts import Cause, read_history, record
from tests.checkpoint.harness import save, verified_steps

_RECIPE = """\
name: own
tokenizer: {kind: bytes}
sources: [{name: own, kind: jsonl, root: own, glob: "*.jsonl"}]
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run on a recipe of its own, submitted, with no attempt yet."""
    made = RunDir(tmp_path / "runs" / "demo")
    made.create()
    with_source(made, ["no JSON"])
    record(made, "submitted", executor="local", job_id="local-1")
    return made


def with_source(run: RunDir, lines: list[str]) -> None:
    folder = run.path.parent.parent
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / "own.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "own.yaml").write_text(_RECIPE)
    words = ["stage=pretrain", "resources.gpus_per_node=0", f"data.recipe={folder}/own.yaml"]
    load.save(load.load(None, words), run.config)


def start(run: RunDir) -> int | None:
    return begin(run, "local", "local-1", ("n1",), 1)


def test_data_that_cannot_be_used_ends_the_run_at_once(run: RunDir) -> None:
    with pytest.raises(MustNotGoOnError, match="the dataset could not be built from") as refused:
        start(run)
    assert refused.value.exit_status == OVER
    (event,) = [e for e in read_records(run.attempts) if e["event"] == "not_begun"]
    assert event["cause"] == "refused"
    situation = read_situation(run)
    assert situation.state is State.failed
    assert situation.detail.startswith("refused: the dataset could not be built from")
    with_source(run, [json.dumps({"text": "one document " * 40})] * 20)
    record(run, "submitted", executor="local", job_id="local-1")
    assert start(run) == 1  # asked for again


def test_a_folder_that_others_may_write_ends_the_run_at_once(run: RunDir) -> None:
    """As after `chmod -R g+w` while it ran: the same on every node."""
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    run.path.chmod(0o770)
    with pytest.raises(UsageError, match="demo has begun no attempt 9"):  # it is read: the end goes on record
        launch.main(["end", str(run.path), "--attempt", "9"])
    with pytest.raises(MustNotGoOnError, match=r"others may write the run folder .*: chmod go-w"):
        start(run)
    assert read_records(run.attempts)[-1]["event"] == "not_begun"


def test_a_payload_that_is_not_ones_own_ends_the_run_at_once(run: RunDir, tmp_path: Path) -> None:
    payload.folder_of(run.path).mkdir(mode=0o700)
    payload.path_of(run.path, "local-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MustNotGoOnError, match="is a symbolic link"):
        begin(run, "local", "local-1", ("n1",), 1, by_submitit=True)
    assert read_records(run.attempts)[-1]["event"] == "not_begun"


def test_a_second_job_leaves_no_word_on_a_folder_that_others_may_write(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is at work."""
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    run.path.chmod(0o770)
    monkeypatch.setattr(may_begin, "ask", lambda *_, **__: JobReport(True))
    with pytest.raises(MustNotGoOnError, match="is already running as job local-1"):
        begin(run, "local", "local-2", ("n1",), 1, by_submitit=True)
    assert read_records(run.attempts)[-1]["event"] == "begin"


def test_room_is_made_before_anything_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last attempt only took out of sight may be all that a full disk has to give."""
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    token, store = read_facts(run, 1).token, CheckpointStore(run.checkpoints)
    for step in (10, 20, 30):
        save(store, step, 1, token)
    assert store.prune([], hurry=True) == [10]
    half = store.open_staging(40, 1, token)
    (half / "rank_0.pt").write_bytes(b"half of it")
    monkeypatch.setattr(failpoints, "_calls", {})
    monkeypatch.setenv("R1HPC_FAILPOINT", "begin.root.before:enospc")
    with pytest.raises(R1hpcError, match="No space left on device"):
        start(run)
    assert [path.name for path in half.parent.iterdir()] == ["begun"]
    monkeypatch.delenv("R1HPC_FAILPOINT")
    assert start(run) == 2
    assert verified_steps(CheckpointStore(run.checkpoints)) == [30, 20]


@pytest.fixture
def full(run: RunDir) -> Iterator[Path]:
    """The folder of the datasets is a file system that is nearly full."""
    folder = run.path.parent / "datasets"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system that is small")
def test_a_full_disk_is_not_the_users_fault(run: RunDir, full: Path) -> None:
    with_source(run, [json.dumps({"text": f"document {n} " * 400}) for n in range(200)])
    with pytest.raises(R1hpcError, match="No space left on device") as refused:
        start(run)
    assert refused.value.exit_status == NOT_THE_NODE
    assert not [e for e in read_records(run.attempts) if e["event"] == "not_begun"]


def test_traces_that_this_node_does_not_see_may_be_seen_by_another(run: RunDir) -> None:
    words = ["stage=sft", "resources.gpus_per_node=0", "data.traces=[/nowhere/traces.jsonl]"]
    load.save(load.load(None, words), run.config)
    with pytest.raises(R1hpcError, match=r"/nowhere/traces\.jsonl") as refused:
        start(run)
    assert refused.value.exit_status == 1


def test_stopped_between_two_attempts_it_stays_stopped(run: RunDir) -> None:
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    record(run, "end", attempt=1, cause="preempted", detail="", requeued=True)
    run.stop.touch()
    assert start(run) is None
    situation = read_situation(run)
    assert (situation.state, situation.state.is_over) == (State.stopped, True)
    assert "before its next attempt began" in situation.detail
    assert read_history(run).attempts[0].cause is Cause.preempted
    run.stop.unlink()
    record(run, "submitted", executor="local", job_id="local-1")
    assert read_situation(run).state is not State.stopped
    assert start(run) == 2


@pytest.fixture
def ended(run: RunDir) -> RunDir:
    """Attempt 1 has run and was preempted."""
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    run.rank_log(1, 0).touch()
    record(run, "end", attempt=1, cause="preempted", detail="", requeued=True)
    return run


@pytest.mark.parametrize(
    ("text", "why"),
    [("", r"attempts\.jsonl holds nothing, but attempt 1 is on disk"), ("{torn\n", "line 1 cannot be read")],
)
def test_damaged_records_are_no_fault_of_a_node(
    ended: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    ended.attempts.write_text(text)
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "n1"), ("TASKS_PER_NODE", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(NotTheNodeError, match=why) as refused:
        launch.main(["begin", str(ended.path)])
    assert refused.value.exit_status == NOT_THE_NODE
    assert capsys.readouterr().out.strip() == str(refused.value)  # for the comment of the job
    assert ended.attempts.read_text() == text


@pytest.mark.parametrize("errno_", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_stays_full_is_no_fault_of_a_node(
    ended: RunDir, monkeypatch: pytest.MonkeyPatch, errno_: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno_, os.strerror(errno_))

    monkeypatch.setattr("r1hpc.attempt.begin.record", refuse)
    with pytest.raises(NotTheNodeError, match=f"{os.strerror(errno_)}: {ended.path}. Make room"):
        start(ended)


def test_a_disk_without_room_for_a_checkpoint_is_not_filled_once_more(run: RunDir) -> None:
    load.save(load.load(None, ["stage=traces", "resources.gpus_per_node=0"]), run.config)
    assert start(run) == 1
    record(run, "end", attempt=1, cause="cluster", detail=f"rank 0 on n1: {os.strerror(errno.ENOSPC)}")
    run.plan.write_text(json.dumps({"checkpoint_bytes": 2**60}))
    with pytest.raises(NotTheNodeError, match=r"a checkpoint needs 1048576.0 TiB, .* are free. Make room"):
        start(run)
    run.plan.write_text(json.dumps({"checkpoint_bytes": 2**20}))  # somebody made room
    assert start(run) == 2


def test_a_temporary_folder_that_is_full_is_the_nodes(ended: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{tempfile.gettempdir()}/r1hpc-x")

    monkeypatch.setattr("r1hpc.attempt.begin.record", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        start(ended)


def test_one_that_was_superseded_is_final_and_says_nothing_of_the_run(
    ended: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SupersededError("attempt 3 has taken over")

    monkeypatch.setattr("r1hpc.attempt.begin.CheckpointStore.begin", refuse)
    with pytest.raises(MustNotGoOnError, match="has taken over") as refused:
        start(ended)
    assert refused.value.exit_status == OVER
    assert read_records(ended.attempts)[-1]["event"] == "end"


@pytest.mark.parametrize("logs_are_gone", [False, True])
def test_an_attempt_number_is_never_used_again(ended: RunDir, logs_are_gone: bool) -> None:
    """The records were lost, and the run is submitted again."""
    assert start(ended) == 2
    ended.rank_log(2, 0).touch()
    if logs_are_gone:
        shutil.rmtree(ended.logs)
        ended.logs.mkdir(mode=0o700)
    ended.attempts.write_text("")
    record(ended, "submitted", executor="local", job_id="local-1")
    assert start(ended) == 3
