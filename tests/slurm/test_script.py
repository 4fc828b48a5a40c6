"""The job script: its text, and what bash makes of it up to the end of its ranks."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.cluster import ClusterConfig, ResourcesConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.script import make_script, render, train_script
from r1hpc.slurm.shell.contract import CURRENT
from tests.slurm.shell import SHOWN, TRAIN, calls_of, program, start

GOLDEN = Path(__file__).parent / "golden" / "job.sh"


def golden_script() -> str:
    """The script kept in golden/job.sh. To renew it: python -m tests.slurm.test_script"""
    cluster = ClusterConfig(
        partition="gpu",
        account="my-group",
        cpus_per_task=12,
        setup=["module load cuda/12.4"],
        python="/opt/venv/bin/python",
        environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1"},
    )
    resources = ResourcesConfig(
        nodes=4,
        gpus_per_node=8,
        signal_lead_s=240,
        time="24:00:00",
        mem="0",
        exclusive=True,
        qos="scavenger",
        comment="a b",
        sbatch={"wckey": "x"},
    )
    config = RunConfig(resources=resources, cluster=cluster)
    return render(make_script(RunDir("/scratch/runs/train-1"), config))


def test_the_script_is_the_one_that_was_agreed() -> None:
    assert golden_script() == GOLDEN.read_text(), (
        "look at the difference; python -m tests.slurm.test_script renews"
    )


def test_train_sh_is_generated_from_the_same_template() -> None:
    assert TRAIN.read_text() == train_script(), "python -m r1hpc.slurm.script > sbatch/train.sh"
    assert os.access(TRAIN, os.X_OK)


def test_both_go_begin_run_and_end_alike() -> None:
    def lines_of_the_attempt(text: str) -> list[str]:
        lines = text[text.index("# -- an attempt: ") :].replace(' "${STEP[@]}"', "").splitlines()
        others = ("payload", "launch rank", "SLURM_GPUS_ON_NODE")
        return [line for line in lines if not any(words in line for words in others)]

    ours, theirs = lines_of_the_attempt(golden_script()), lines_of_the_attempt(train_script())
    assert len(ours) > 6
    assert [line for line in ours if "patiently" not in line] == [
        line for line in theirs if "patiently" not in line
    ]


@pytest.mark.parametrize(
    ("text", "most"), [(golden_script(), 78), (train_script(), 110)], ids=["job", "train"]
)
def test_it_is_short_enough_to_be_read(text: str, most: int) -> None:
    assert len([line for line in text.splitlines() if not line.startswith("#SBATCH")]) <= most


@pytest.mark.parametrize("text", [golden_script(), train_script()], ids=["submit", "train.sh"])
def test_bash_parses_it_and_options_come_first(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    directives = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    # sbatch stops reading options at the first line that is no comment.
    assert all(line.startswith("#") for line in lines[: directives[-1] + 1])


def test_the_shell_outlives_sigterm_and_reports_the_status_of_srun(stage: Path) -> None:
    (stage / "attempt").write_text("3\n")
    shell = start(stage)
    while not (stage / "calls").exists() or "srun" not in (stage / "calls").read_text():
        time.sleep(0.02)
    shell.send_signal(signal.SIGTERM)
    shell.send_signal(signal.SIGUSR2)
    assert shell.wait(timeout=30) == 1, (stage / "run" / "logs" / "slurm-9.out").read_text()
    begin, srun, end = calls_of(stage)
    assert begin == f"python -m r1hpc.launch begin {stage}/run"
    assert end == f"python -m r1hpc.launch end {stage}/run --attempt 3 --status 7"
    assert srun.startswith("srun 8 ")  # threads: 32 cores for 4 ranks
    assert "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=8" in srun
    assert f"--output={stage}/run/logs/attempt_3/rank_%t.out {stage}/python -u -m r1hpc.launch rank" in srun


def test_a_begin_that_takes_long_is_ended_with_the_job(stage: Path) -> None:
    """Some sites send TERM to this shell alone; whoever waits for begin then runs into KILL."""
    program(
        stage / "python",
        f"echo begins >> {stage}/calls\ntrap 'echo told >> {stage}/calls; exit 143' TERM\n"
        "while :; do sleep 0.05; done\n",
    )
    program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ] || cat {stage}/shown")
    (stage / "shown").write_text(SHOWN.format("RUNNING", 0, "None"))
    shell = start(stage)
    while not (stage / "calls").exists():
        time.sleep(0.02)
    shell.send_signal(signal.SIGUSR2)  # the warning of a time limit: begin may still be done with it
    time.sleep(0.5)
    assert "told" not in (stage / "calls").read_text()
    (stage / "shown").write_text(SHOWN.format("COMPLETING", 0, "9"))
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=30) == 1
    calls = calls_of(stage)
    assert calls.count("begins") == 1
    assert calls[calls.index("told") :][-1] == "scontrol requeue 9"
    assert not list((stage / "run" / "logs").glob("begin-*"))


def test_a_run_that_is_over_starts_nothing(stage: Path) -> None:
    (stage / "attempt").write_text("")
    assert start(stage).wait(timeout=30) == 0
    assert calls_of(stage) == [f"python -m r1hpc.launch begin {stage}/run"]


@pytest.mark.parametrize("contract", [1, 2, CURRENT])
def test_the_payload_is_looked_at_before_it_is_loaded(stage: Path, contract: int) -> None:
    """By `begin`; by a module of its own in frozen code of before. Here both refuse it."""
    program(stage / "python", f'echo "python $*" >> {stage}/calls\nexit 3\n')
    assert start(stage, contract, by_submitit=True).wait(timeout=30) == 1
    before, now = f"slurm.payload {stage}/run", f"launch begin {stage}/run --payload"
    assert calls_of(stage) == [f"python -m r1hpc.{now if contract == CURRENT else before}"]


@pytest.mark.parametrize(("status", "contract"), [(3, CURRENT), (2, 1), (1, 1)])
def test_a_begin_that_may_not_go_on_starts_nothing(stage: Path, status: int, contract: int) -> None:
    program(stage / "python", f"echo python >> {stage}/calls; exit {status}")
    assert start(stage, contract).wait(timeout=30) == 1
    assert len(calls_of(stage)) == 1


def test_code_of_before_says_with_one_status_that_it_is_over(stage: Path) -> None:
    """A run of 0.1.0 that was resumed by this version: `begin` refuses, or `end` finds the run over."""
    program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls")
    program(stage / "python", f"echo python $* >> {stage}/calls; exit 1")
    assert start(stage, contract=1).wait(timeout=30) == 1
    assert calls_of(stage) == [f"python -m r1hpc.launch begin {stage}/run"]
    (stage / "calls").unlink()
    (stage / "attempt").write_text("3\n")
    old_end = "[ $# = 8 ] || exit 2\nexit 1\n"  # it knows no --hurry
    program(
        stage / "python",
        f"echo python $* >> {stage}/calls\n[ $3 = begin ] && exec cat {stage}/attempt\n{old_end}",
    )
    assert start(stage, contract=1).wait(timeout=30) == 1
    assert [call.split()[0] for call in calls_of(stage)] == ["python", "srun", "python"]


@pytest.mark.parametrize("status", [1, 2])  # 2: `uv run python` where uv itself fails
def test_a_begin_that_fails_is_tried_again(stage: Path, status: int) -> None:
    (stage / "attempt").write_text("3\n")
    program(
        stage / "python",
        f"echo python $* >> {stage}/calls\n"
        f"[ $3 = end ] && exit 3\n[ $(wc -l < {stage}/calls) -ge 2 ] || exit {status}\ncat {stage}/attempt",
    )
    assert start(stage).wait(timeout=30) == 1
    assert [call.split()[0] for call in calls_of(stage)] == ["python", "python", "srun", "python"]
    assert f"begin failed with status {status}: again in 2 s" in (stage / "run/logs/slurm-9.out").read_text()


def test_nodes_that_the_user_excluded_stay_excluded(stage: Path) -> None:
    """Slurm is silent when the shell first asks which ones they are."""
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    shown = (
        "JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ReqNodeList=(null) ExcNodeList=n7 Features=(null)"
    )
    program(
        stage / "scontrol",
        f"echo scontrol $* >> {stage}/calls\n"
        f"[ $1-$2 != show-job ] || [ $(grep -c 'show job' {stage}/calls) -lt 9 ] || echo '{shown}'",
    )
    assert start(stage).wait(timeout=30) == 1
    assert "scontrol requeue Incomplete 9" in calls_of(stage)
    assert calls_of(stage)[-1] == "scontrol update JobId=9 ExcNodeList=n7,n1"


def test_a_job_that_cannot_be_kept_from_a_node_is_held(stage: Path) -> None:
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    shown = "JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ExcNodeList=(null) Features=(null)"
    program(
        stage / "scontrol",
        f"echo scontrol $* >> {stage}/calls\n[ $1-$2 != show-job ] || echo '{shown}'\n[ $1 != update ]",
    )
    assert start(stage).wait(timeout=30) == 1
    said = "it could not be kept from these nodes, n1"
    comment = f"scontrol update JobId=9 Comment=r1hpc: {said}"
    assert calls_of(stage)[-3:] == ["scontrol update JobId=9 ExcNodeList=n1", "scontrol hold 9", comment]
    assert (
        f"job 9 is held: {said}. scontrol release 9 lets it go on"
        in (stage / "run/logs/slurm-9.out").read_text()
    )


def test_where_slurm_never_says_which_nodes_are_excluded_none_is_added(stage: Path) -> None:
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ]")
    assert start(stage).wait(timeout=30) == 1
    assert calls_of(stage)[-2:] == ["scontrol requeue Incomplete 9", "scontrol show job -o 9"]
    assert "this job runs again, where Slurm chooses" in (stage / "run/logs/slurm-9.out").read_text()


def test_the_task_of_an_array_asks_for_itself_alone(stage: Path) -> None:
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ]")
    assert start(stage, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="4").wait(timeout=30) == 1
    assert calls_of(stage)[0] == "scontrol show job -o 9", "whether it is one"
    assert set(calls_of(stage)[1:]) == {"scontrol show job -o 9_4", "scontrol requeue Incomplete 9_4"}


def test_a_job_that_the_task_of_an_array_has_submitted_is_none_itself(stage: Path) -> None:
    """sbatch has brought along its caller's environment: a requeue would start that one again."""
    program(stage / "python", "exit 1")
    program(stage / "sleep", "")
    shown = "JobId=9 JobName=ArrayTaskId=1 UserId=me(1) JobState=RUNNING Restarts=1 ExcNodeList= Features="
    program(
        stage / "scontrol",
        f"echo $SLURM_RESTART_COUNT scontrol $* >> {stage}/calls\n[ $1 != show ] || echo '{shown}'",
    )
    shell = start(stage, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4", SLURM_RESTART_COUNT="3")
    assert shell.wait(timeout=30) == 1
    first, *others = calls_of(stage)
    assert first == "3 scontrol show job -o 9"
    assert others
    assert all(call.startswith("1 scontrol ") for call in others)
    assert not [call for call in others if "7_4" in call]


@pytest.mark.parametrize(("state", "own"), [("RUNNING", "3"), ("COMPLETING", "2"), ("PENDING", "2")])
def test_a_job_that_is_requeued_while_its_script_starts_keeps_its_own_count(
    stage: Path, state: str, own: str
) -> None:
    """Slurm counts the next start already: by that number the requeue would look like a scancel."""
    program(stage / "python", f"echo $SLURM_RESTART_COUNT python >> {stage}/calls; exit 3")
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={state} Reason=None Requeue=1 Restarts=3 BatchFlag=2"
    program(stage / "scontrol", f"echo '{shown}'")
    assert start(stage, SLURM_RESTART_COUNT="2").wait(timeout=30) == 1
    assert {call for call in calls_of(stage) if "python" in call} == {f"{own} python"}


def test_ranks_get_the_cpus_that_every_node_has_and_the_environment_of_the_job(stage: Path) -> None:
    """The batch host's own number is of that node; --export=NONE leaves word for srun."""
    (stage / "attempt").write_text("3\n")
    program(stage / "srun", f'echo "$SLURM_EXPORT_ENV $*" > {stage}/srun.txt')
    nodes = "128(x2),96,128"
    shell = start(stage, SLURM_CPUS_ON_NODE="128", SLURM_JOB_CPUS_PER_NODE=nodes, SLURM_EXPORT_ENV="NONE")
    assert shell.wait(timeout=30) == 1
    said = (stage / "srun.txt").read_text()
    assert said.startswith("ALL ")
    assert "--cpus-per-task=24 " in said


@pytest.mark.parametrize("clock", ["-300s", "+0s", "+300s"])
@pytest.mark.parametrize(
    ("state", "run", "limit", "hurry"),
    [
        ("RUNNING Reason=None", "00:55:00", "01:00:00", ""),  # the warning ahead of the limit
        ("RUNNING Reason=None", "01:00:02", "01:00:00", ""),  # counted by the clock of this host
        ("RUNNING Reason=None", "INVALID", "01:00:00", ""),
        ("COMPLETING Reason=None", "00:59:59", "01:00:00", ""),
        ("COMPLETING Reason=TimeLimit", "01:00:00", "01:00:00", " --hurry"),
        ("COMPLETING Reason=TimeLimit", "00:01:00", "01:00:00", " --hurry"),  # the end of its reservation
        ("COMPLETING Reason=None", "9-00:00:00", "UNLIMITED", ""),
    ],
)
def test_the_time_limit_is_what_slurm_counts(
    stage: Path, state: str, run: str, limit: str, hurry: str, clock: str
) -> None:
    """Neither the clock of this host nor SLURM_JOB_END_TIME, which a suspension moves."""
    (stage / "attempt").write_text("3\n")
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={state} RunTime={run} TimeLimit={limit} "
    program(stage / "scontrol", f'echo "{shown}EndTime=2000 PreemptTime=None"')
    program(stage / "squeue", "echo 0:00")
    program(stage / "date", f'exec /usr/bin/date -d "now {clock.rstrip("s")} seconds" "$@"')
    shell = start(stage, SLURM_JOB_END_TIME=str(int(time.time())))
    while not (stage / "calls").exists() or "srun" not in (stage / "calls").read_text():
        time.sleep(0.02)
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=30) == 1
    assert calls_of(stage)[-1] == f"python -m r1hpc.launch end {stage}/run --attempt 3 --status 7{hurry}"


@pytest.mark.parametrize(("said", "known"), [("2026-11-01T12:00:00", "1793534400"), ("", ""), ("N/A", "")])
def test_an_older_slurm_is_asked_when_the_limit_ends(stage: Path, said: str, known: str) -> None:
    (stage / "attempt").write_text("3\n")
    program(stage / "squeue", f"echo {said} {said.replace('11-01', '11-03')}")
    program(stage / "srun", f'echo "$SLURM_JOB_START_TIME" "$SLURM_JOB_END_TIME" > {stage}/known')
    assert start(stage, SLURM_JOB_END_TIME="", TZ="UTC").wait(timeout=30) == 1
    assert (stage / "known").read_text().split() == ([known, str(int(known) + 2 * 86400)] if known else [])


if __name__ == "__main__":
    GOLDEN.write_text(golden_script())
