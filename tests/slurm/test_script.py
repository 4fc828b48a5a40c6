"""The job script: its text, and what bash makes of it."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.cluster import ClusterConfig, ResourcesConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.contract import CURRENT, NOT_THE_NODE
from r1hpc.slurm.script import FUNCTIONS, Script, make_script, render, train_script

GOLDEN = Path(__file__).parent / "golden" / "job.sh"
TRAIN = Path(__file__).parents[2] / "sbatch" / "train.sh"


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
        time="24:00:00",
        mem="0",
        exclusive=True,
        qos="scavenger",
        comment="a b",
        sbatch={"wckey": "x"},
    )
    config = RunConfig(resources=resources, cluster=cluster)
    return render(make_script(RunDir("/scratch/runs/train-1"), config, gpus_per_node=8, signal_lead_s=240))


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
    ("text", "most"), [(golden_script(), 72), (train_script(), 105)], ids=["job", "train"]
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


def test_without_slurm_train_sh_says_what_to_do() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", str(TRAIN)], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch sbatch/train.sh" in done.stderr
    assert "python -m r1hpc.submit" in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A PATH where `srun` takes half a second and ends with 7, and an interpreter that notes its words."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    _place_functions(tmp_path / "run" / "code")
    _program(tmp_path / "srun", f'echo "srun $OMP_NUM_THREADS $*" >> {tmp_path}/calls\nsleep 0.5\nexit 7\n')
    _program(
        tmp_path / "python",
        f'echo "python $*" >> {tmp_path}/calls\n'
        f'if [ "$3" = begin ]; then exec cat {tmp_path}/attempt; fi\n'
        "exit 3\n",
    )
    return tmp_path


def _place_functions(code: Path, last_line: str = "") -> None:
    path = code / "r1hpc" / "slurm" / "job.bash"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{FUNCTIONS.read_text()}\n{last_line}")
    path.chmod(0o600)


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o700)


def _start(
    stage: Path, contract: int = CURRENT, *, by_submitit: bool = False, **variables: str
) -> "subprocess.Popen[str]":
    python = (str(stage / "python"),)
    script = Script(stage / "run", python, 4, {"nodes": "2"}, by_submitit=by_submitit, contract=contract)
    (stage / "job.sh").write_text(render(script))
    environ = {
        "PATH": f"{stage}:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "32",
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_END_TIME": "99999999999",
        **variables,
    }
    return subprocess.Popen(["bash", str(stage / "job.sh")], env=environ, text=True, stderr=subprocess.PIPE)


def _calls(stage: Path) -> list[str]:
    return (stage / "calls").read_text().splitlines()


def test_the_shell_outlives_sigterm_and_reports_the_status_of_srun(stage: Path) -> None:
    (stage / "attempt").write_text("3\n")
    shell = _start(stage)
    while not (stage / "calls").exists() or "srun" not in (stage / "calls").read_text():
        time.sleep(0.02)
    shell.send_signal(signal.SIGTERM)
    shell.send_signal(signal.SIGUSR2)
    assert shell.wait(timeout=30) == 1, (stage / "run" / "logs" / "slurm-9.out").read_text()
    begin, srun, end = _calls(stage)
    assert begin == f"python -m r1hpc.launch begin {stage}/run"
    assert end == f"python -m r1hpc.launch end {stage}/run --attempt 3 --status 7"
    assert srun.startswith("srun 8 ")  # threads: 32 cores for 4 ranks
    assert "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=8" in srun
    assert f"--output={stage}/run/logs/attempt_3/rank_%t.out {stage}/python -u -m r1hpc.launch rank" in srun


def test_a_begin_that_takes_long_is_ended_with_the_job(stage: Path) -> None:
    """Some sites send TERM to this shell alone; whoever waits for begin then runs into KILL."""
    _program(
        stage / "python",
        f"echo begins >> {stage}/calls\ntrap 'echo told >> {stage}/calls; exit 143' TERM\n"
        "while :; do sleep 0.05; done\n",
    )
    _program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ] || cat {stage}/shown")
    (stage / "shown").write_text(_SHOWN.format("RUNNING", 0, "None"))
    shell = _start(stage)
    while not (stage / "calls").exists():
        time.sleep(0.02)
    shell.send_signal(signal.SIGUSR2)  # the warning of a time limit: begin may still be done with it
    time.sleep(0.5)
    assert "told" not in (stage / "calls").read_text()
    (stage / "shown").write_text(_SHOWN.format("COMPLETING", 0, "9"))
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=30) == 1
    calls = _calls(stage)
    assert calls.count("begins") == 1
    assert calls[calls.index("told") :][-1] == "scontrol requeue 9"
    assert not list((stage / "run" / "logs").glob("begin-*"))


def test_a_run_that_is_over_starts_nothing(stage: Path) -> None:
    (stage / "attempt").write_text("")
    assert _start(stage).wait(timeout=30) == 0
    assert _calls(stage) == [f"python -m r1hpc.launch begin {stage}/run"]


@pytest.mark.parametrize("contract", [1, 2, CURRENT])
def test_the_payload_is_looked_at_before_it_is_loaded(stage: Path, contract: int) -> None:
    """By `begin`; by a module of its own in frozen code of before. Here both refuse it."""
    _program(stage / "python", f'echo "python $*" >> {stage}/calls\nexit 3\n')
    assert _start(stage, contract, by_submitit=True).wait(timeout=30) == 1
    before, now = f"slurm.payload {stage}/run", f"launch begin {stage}/run --payload"
    assert _calls(stage) == [f"python -m r1hpc.{now if contract == CURRENT else before}"]


@pytest.mark.parametrize(("status", "contract"), [(3, CURRENT), (2, 1), (1, 1)])
def test_a_begin_that_may_not_go_on_starts_nothing(stage: Path, status: int, contract: int) -> None:
    _program(stage / "python", f"echo python >> {stage}/calls; exit {status}")
    assert _start(stage, contract).wait(timeout=30) == 1
    assert len(_calls(stage)) == 1


def test_code_of_before_says_with_one_status_that_it_is_over(stage: Path) -> None:
    """A run of 0.1.0 that was resumed by this version: `begin` refuses, or `end` finds the run over."""
    _program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls")
    _program(stage / "python", f"echo python $* >> {stage}/calls; exit 1")
    assert _start(stage, contract=1).wait(timeout=30) == 1
    assert _calls(stage) == [f"python -m r1hpc.launch begin {stage}/run"]
    (stage / "calls").unlink()
    (stage / "attempt").write_text("3\n")
    old_end = "[ $# = 8 ] || exit 2\nexit 1\n"  # it knows no --hurry
    _program(
        stage / "python",
        f"echo python $* >> {stage}/calls\n[ $3 = begin ] && exec cat {stage}/attempt\n{old_end}",
    )
    assert _start(stage, contract=1).wait(timeout=30) == 1
    assert [call.split()[0] for call in _calls(stage)] == ["python", "srun", "python"]


@pytest.mark.parametrize("status", [1, 2])  # 2: `uv run python` where uv itself fails
def test_a_begin_that_fails_is_tried_again(stage: Path, status: int) -> None:
    (stage / "attempt").write_text("3\n")
    _program(
        stage / "python",
        f"echo python $* >> {stage}/calls\n"
        f"[ $3 = end ] && exit 3\n[ $(wc -l < {stage}/calls) -ge 2 ] || exit {status}\ncat {stage}/attempt",
    )
    assert _start(stage).wait(timeout=30) == 1
    assert [call.split()[0] for call in _calls(stage)] == ["python", "python", "srun", "python"]
    assert f"begin failed with status {status}: again in 2 s" in (stage / "run/logs/slurm-9.out").read_text()


def test_nodes_that_the_user_excluded_stay_excluded(stage: Path) -> None:
    """Slurm is silent when the shell first asks which ones they are."""
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    shown = (
        "JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ReqNodeList=(null) ExcNodeList=n7 Features=(null)"
    )
    _program(
        stage / "scontrol",
        f"echo scontrol $* >> {stage}/calls\n"
        f"[ $1-$2 != show-job ] || [ $(grep -c 'show job' {stage}/calls) -lt 9 ] || echo '{shown}'",
    )
    assert _start(stage).wait(timeout=30) == 1
    assert "scontrol requeue Incomplete 9" in _calls(stage)
    assert _calls(stage)[-1] == "scontrol update JobId=9 ExcNodeList=n7,n1"


def test_a_job_that_cannot_be_kept_from_a_node_is_held(stage: Path) -> None:
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    shown = "JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ExcNodeList=(null) Features=(null)"
    _program(
        stage / "scontrol",
        f"echo scontrol $* >> {stage}/calls\n[ $1-$2 != show-job ] || echo '{shown}'\n[ $1 != update ]",
    )
    assert _start(stage).wait(timeout=30) == 1
    said = "it could not be kept from these nodes, n1"
    comment = f"scontrol update JobId=9 Comment=r1hpc: {said}"
    assert _calls(stage)[-3:] == ["scontrol update JobId=9 ExcNodeList=n1", "scontrol hold 9", comment]
    assert (
        f"job 9 is held: {said}. scontrol release 9 lets it go on"
        in (stage / "run/logs/slurm-9.out").read_text()
    )


def test_where_slurm_never_says_which_nodes_are_excluded_none_is_added(stage: Path) -> None:
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    _program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ]")
    assert _start(stage).wait(timeout=30) == 1
    assert _calls(stage)[-2:] == ["scontrol requeue Incomplete 9", "scontrol show job -o 9"]
    assert "this job runs again, where Slurm chooses" in (stage / "run/logs/slurm-9.out").read_text()


def test_the_task_of_an_array_asks_for_itself_alone(stage: Path) -> None:
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    _program(stage / "scontrol", f"echo scontrol $* >> {stage}/calls\n[ $1 != show ]")
    assert _start(stage, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="4").wait(timeout=30) == 1
    assert _calls(stage)[0] == "scontrol show job -o 9", "whether it is one"
    assert set(_calls(stage)[1:]) == {"scontrol show job -o 9_4", "scontrol requeue Incomplete 9_4"}


def test_a_job_that_the_task_of_an_array_has_submitted_is_none_itself(stage: Path) -> None:
    """sbatch has brought along its caller's environment: a requeue would start that one again."""
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    shown = "JobId=9 JobName=ArrayTaskId=1 UserId=me(1) JobState=RUNNING Restarts=1 ExcNodeList= Features="
    _program(
        stage / "scontrol",
        f"echo $SLURM_RESTART_COUNT scontrol $* >> {stage}/calls\n[ $1 != show ] || echo '{shown}'",
    )
    shell = _start(stage, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4", SLURM_RESTART_COUNT="3")
    assert shell.wait(timeout=30) == 1
    first, *others = _calls(stage)
    assert first == "3 scontrol show job -o 9"
    assert others
    assert all(call.startswith("1 scontrol ") for call in others)
    assert not [call for call in others if "7_4" in call]


def test_ranks_get_the_cpus_that_every_node_has_and_the_environment_of_the_job(stage: Path) -> None:
    """The batch host's own number is of that node; --export=NONE leaves word for srun."""
    (stage / "attempt").write_text("3\n")
    _program(stage / "srun", f'echo "$SLURM_EXPORT_ENV $*" > {stage}/srun.txt')
    nodes = "128(x2),96,128"
    shell = _start(stage, SLURM_CPUS_ON_NODE="128", SLURM_JOB_CPUS_PER_NODE=nodes, SLURM_EXPORT_ENV="NONE")
    assert shell.wait(timeout=30) == 1
    said = (stage / "srun.txt").read_text()
    assert said.startswith("ALL ")
    assert "--cpus-per-task=24 " in said


@pytest.mark.parametrize("clock", ["-300s", "+0s", "+300s"])
@pytest.mark.parametrize(
    ("state", "run", "limit", "hurry"),
    [
        ("RUNNING", "00:55:00", "01:00:00", ""),  # the warning ahead of the limit
        ("RUNNING", "01:00:02", "01:00:00", ""),  # counted by the clock of this host
        ("RUNNING", "INVALID", "01:00:00", ""),
        ("COMPLETING", "00:59:59", "01:00:00", ""),
        ("COMPLETING", "01:00:00", "01:00:00", " --hurry"),
        ("COMPLETING", "1-00:00:03", "23:59:00", " --hurry"),
        ("COMPLETING", "23:59:59", "1-00:00:00", ""),
        ("COMPLETING", "9-00:00:00", "10-00:00:00", ""),
        ("COMPLETING", "9-00:00:00", "UNLIMITED", ""),
    ],
)
def test_the_time_limit_is_what_slurm_counts(
    stage: Path, state: str, run: str, limit: str, hurry: str, clock: str
) -> None:
    """Neither the clock of this host nor SLURM_JOB_END_TIME, which a suspension moves."""
    (stage / "attempt").write_text("3\n")
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={state} Reason=None RunTime={run} TimeLimit={limit} "
    _program(stage / "scontrol", f'echo "{shown}EndTime=2000 PreemptTime=None"')
    _program(stage / "squeue", "echo 0:00")
    _program(stage / "date", f'exec /usr/bin/date -d "now {clock.rstrip("s")} seconds" "$@"')
    shell = _start(stage, SLURM_JOB_END_TIME=str(int(time.time())))
    while not (stage / "calls").exists() or "srun" not in (stage / "calls").read_text():
        time.sleep(0.02)
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=30) == 1
    assert _calls(stage)[-1] == f"python -m r1hpc.launch end {stage}/run --attempt 3 --status 7{hurry}"


@pytest.mark.parametrize(("said", "known"), [("2026-11-01T12:00:00", "1793534400"), ("", ""), ("N/A", "")])
def test_an_older_slurm_is_asked_when_the_limit_ends(stage: Path, said: str, known: str) -> None:
    (stage / "attempt").write_text("3\n")
    _program(stage / "squeue", f"echo {said} {said.replace('11-01', '11-03')}")
    _program(stage / "srun", f'echo "$SLURM_JOB_START_TIME" "$SLURM_JOB_END_TIME" > {stage}/known')
    assert _start(stage, SLURM_JOB_END_TIME="", TZ="UTC").wait(timeout=30) == 1
    assert (stage / "known").read_text().split() == ([known, str(int(known) + 2 * 86400)] if known else [])


def test_train_sh_takes_nothing_of_the_step_it_was_submitted_from(stage: Path) -> None:
    """As in `srun --pty -c 8 bash`: Slurm sets a SLURM_CPUS_PER_TASK that is there to 1."""
    (stage / "attempt").write_text("3\n")
    (stage / "run" / "site.sh").touch()
    answers = f"--prepare-only) echo 4 {stage}/run ;; begin) cat {stage}/attempt ;; *) exit 3 ;;"
    _program(stage / "python", f'case "$3" in {answers} esac\n')
    leaked = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "4000", "SLURM_GPUS": "1"}
    _program(stage / "srun", f'env > {stage}/known; echo "srun $*" >> {stage}/calls')
    _start_train(stage, **leaked, SLURM_CPUS_PER_TASK="1", SLURM_JOB_CPUS_PER_NODE="128(x4)")
    known = dict(line.partition("=")[::2] for line in (stage / "known").read_text().splitlines())
    assert "OMP_NUM_THREADS" in known
    assert not leaked.keys() & known.keys()
    assert "--cpus-per-task=32" in next(call for call in _calls(stage) if call.startswith("srun"))


def _start_train(stage: Path, *words: str, **variables: str) -> str:
    """Return the output of sbatch/train.sh, submitted in a clone."""
    if not (stage / "r1hpc").exists():
        _place_functions(stage)
    (stage / "r1hpc" / "submit.py").touch()
    environ = {
        "PATH": f"{stage}:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NAME": "train",
        "SLURM_SUBMIT_DIR": str(stage),
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_END_TIME": "99999999999",
        "R1HPC_PYTHON": str(stage / "python"),
        **variables,
    }
    command = ["bash", str(TRAIN), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.mark.parametrize(("recorded", "code"), [("", "."), ('{"event":', "."), ("{}\n", "runs/train-9/code")])
def test_a_half_made_run_is_made_anew_by_the_code_of_the_clone(stage: Path, recorded: str, code: str) -> None:
    for place in (".", "runs/train-9/code"):
        _place_functions(stage / place, f"echo {place} >> {stage}/calls")
        (stage / place / "r1hpc" / "submit.py").touch()
    (stage / "runs" / "train-9" / "attempts.jsonl").write_text(recorded)
    _program(stage / "python", f"echo $PYTHONPATH >> {stage}/calls; exit 2")
    _start_train(stage)
    assert _calls(stage) == [code, str(stage / code)]


def test_train_sh_outside_a_clone_takes_the_functions_of_the_installed_package(stage: Path) -> None:
    _place_functions(stage / "site", f"echo installed >> {stage}/calls")
    (stage / "r1hpc").mkdir()
    _program(
        stage / "python", f"[ $1 = -c ] && exec echo {stage}/site/r1hpc\necho $* >> {stage}/calls; exit 2"
    )
    (stage / "my").mkdir()
    _start_train(stage, SLURM_SUBMIT_DIR=str(stage / "my"))
    assert _calls(stage) == [
        "installed",
        f"-m r1hpc.submit --prepare-only --run-root {stage}/my/runs --run-name train-9",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("--run-name", "a", "--run-root", "my runs"),
        ("x.yaml", "--run-name=b", "train.lr=1", "--run-root=my runs", "--run-name=a"),
        ("t.py", "--run-root=my runs", "--run-name=a", "--", "--run-name", "of-the-script"),
    ],
)
def test_train_sh_finds_the_run_that_its_words_name(stage: Path, words: tuple[str, ...]) -> None:
    _place_functions(stage / "my runs" / "a" / "code", f"echo a >> {stage}/calls; exit 1")
    (stage / "my runs" / "a" / "attempts.jsonl").write_text("{}\n")
    _start_train(stage, *words)
    assert _calls(stage) == ["a"]


def test_train_sh_leaves_a_script_its_own_words(stage: Path) -> None:
    _program(stage / "python", f"echo $* > {stage}/calls; exit 2")
    _start_train(stage, "t.py", "--", "--lr", "1e-4")
    where = f"--run-root {stage}/runs --run-name train-9"
    assert _calls(stage) == [f"-m r1hpc.submit --prepare-only {where} t.py -- --lr 1e-4"]


def test_train_sh_has_no_successor_before_its_run_is_there(stage: Path) -> None:
    """It would be one without the job's arguments, or of a foreign RUN_DIR."""
    (stage / "run" / "job.sh").touch()
    _program(stage / "python", "exit 1")
    _program(stage / "sleep", "")
    _program(stage / "sbatch", f"echo sbatch >> {stage}/calls")
    _program(stage / "scontrol", "[ $1 != requeue ] || { echo 'presently disabled'; exit 1; }")
    assert "submit it again yourself" in _start_train(stage, RUN_DIR=str(stage / "run"))
    assert not (stage / "calls").exists()


_SHOWN = "JobId=9 JobName=x UserId=me(1) JobState={} Restarts={} EndTime=9 Deadline=N/A PreemptTime={} End=9"


@pytest.mark.parametrize(
    ("shown", "asked"),
    [
        (_SHOWN.format("RUNNING", 0, "None"), "requeue Incomplete 9"),
        (_SHOWN.format("RUNNING", 0, "5"), "requeue Incomplete 9"),
        (_SHOWN.format("COMPLETING", 0, "9"), "requeue 9"),  # the end of a grace time
        ("", "requeue Incomplete 9"),  # no answer
        (_SHOWN.format("NODE_FAIL", 0, "None"), "requeue 9"),  # slurmd was lost, and this script lives on
        (_SHOWN.format("COMPLETING", 0, "5"), ""),  # scancel in the grace time
        (_SHOWN.format("COMPLETING", 0, "None"), ""),  # scancel
        (_SHOWN.format("CANCELLED", 0, "None"), ""),
        (_SHOWN.format("COMPLETING", 1, "None"), ""),  # Slurm has requeued it
        (_SHOWN.format("PENDING", 1, "None"), ""),
        (
            _SHOWN.format("RUNNING", 1, "None"),
            "",
        ),  # and has started it elsewhere
        # Another node is lost, and the job may not be requeued.
        (_SHOWN.format("COMPLETING Reason=NodeDown", 0, "None"), "requeue 9"),
    ],
)
@pytest.mark.parametrize("killed", ["kill -KILL $$", "exit 1"])
def test_the_shell_asks_for_the_next_attempt_where_python_cannot(
    stage: Path, killed: str, shown: str, asked: str
) -> None:
    (stage / "attempt").write_text("3\n")
    _program(stage / "srun", "exit 0")
    _program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\n{killed}")
    (stage / "shown").write_text(shown)
    pending = _SHOWN.format("PENDING", 1, "None")
    _program(
        stage / "scontrol",
        f"[ $1 != show ] || exec cat {stage}/shown\necho $* >> {stage}/requeues\n"
        f"echo '{pending}' > {stage}/shown",
    )
    (stage / "requeues").touch()
    assert _start(stage).wait(timeout=30) == 1
    assert (stage / "requeues").read_text().strip() == asked


def test_the_shell_does_not_undo_a_scancel_between_its_look_and_the_requeue(stage: Path) -> None:
    """Slurm says nothing, and does nothing."""
    (stage / "attempt").write_text("3\n")
    _program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\nexit 1")
    (stage / "shown").write_text(_SHOWN.format("RUNNING", 0, "None"))
    cancelled = _SHOWN.format("COMPLETING", 0, "None")
    _program(
        stage / "scontrol",
        f"[ $1 != show ] || exec cat {stage}/shown\necho $* >> {stage}/requeues\n"
        f"echo '{cancelled}' > {stage}/shown",
    )
    assert _start(stage).wait(timeout=30) == 1
    assert (stage / "requeues").read_text() == "requeue Incomplete 9\n"
    assert "job 9 was cancelled: not run again" in (stage / "run/logs/slurm-9.out").read_text()


def _fails_to_begin(stage: Path, status: int, pinned: str = "(null)") -> list[str]:
    """Return the shell's calls of scontrol when each `begin` leaves with this status and a reason."""
    _program(stage / "python", f"echo 'Disk quota exceeded: /runs'; exit {status}")
    _program(stage / "sleep", "")
    shown = f"JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ReqNodeList={pinned} ExcNodeList=(null) End=1"
    _program(
        stage / "scontrol",
        f"[ $1 != show ] || {{ [ $2 = hostnames ] && echo n1 || echo '{shown}'; exit; }}\n"
        f"echo $* >> {stage}/calls",
    )
    assert _start(stage).wait(timeout=30) == 1
    return _calls(stage)


def test_the_disk_of_the_run_is_no_fault_of_a_node(stage: Path) -> None:
    """It is tried again as any begin that fails, and then held with the reason."""
    asked = _fails_to_begin(stage, NOT_THE_NODE)
    assert asked[-2:] == ["hold 9", "update JobId=9 Comment=r1hpc: Disk quota exceeded: /runs"]
    assert "requeue Incomplete 9" in asked
    assert not [call for call in asked if "ExcNodeList" in call]
    last = (stage / "run/logs/slurm-9.out").read_text().splitlines()[-1]
    assert last == "job 9 is held: Disk quota exceeded: /runs. scontrol release 9 lets it go on"


def test_a_node_that_the_job_asks_for_by_name_is_not_excluded(stage: Path) -> None:
    """Such a job could never start."""
    asked = _fails_to_begin(stage, 1, pinned="n1")
    assert asked[-2] == "hold 9"
    assert asked[-1].endswith("see slurm-9.out, and the job asks for n1 by name")
    assert not [call for call in asked if "ExcNodeList" in call]


@pytest.mark.parametrize(
    ("nodes", "count", "refused", "asked"),
    [
        ("ReqNodeList=(null) ExcNodeList=(null)", 1, "-", ["without n1"]),
        ("ReqNodeList=(null) ExcNodeList=n[5-7]", 4, "-", ["without n[5-7],n1"]),
        ("ReqNodeList=(null) ExcNodeList=n[4-7]", 5, "-", None),
        ("ReqNodeList=(null) ExcNodeList=(null)", 1, "ExcNodeList", ["without n1", "hold", "reason"]),
        ("ReqNodeList=n1 ExcNodeList=(null)", 1, "-", ["hold", "reason"]),
    ],
)
@pytest.mark.parametrize("is_task", [False, True])
def test_a_node_that_does_not_see_the_run_hands_the_job_on(
    stage: Path, nodes: str, count: int, refused: str, asked: list[str] | None, is_task: bool
) -> None:
    """At first Slurm does not answer."""
    shutil.rmtree(stage / "run")
    _program(stage / "sleep", "")
    task = "ArrayJobId=7 ArrayTaskId=4 " if is_task else ""
    shown = f"JobId=9 {task}JobName=x UserId=me(1) {nodes} Features=(null)"
    _program(
        stage / "scontrol",
        f"[ $2 = hostnames ] && exec seq {count}\n"
        f"if [ $1 = show ]; then echo '{shown}'; mv {stage}/silent {stage}/answers && exit 1; exit 0; fi\n"
        f'echo $* >> {stage}/calls; [[ "$*" != *{refused}=* && $1 != {refused} ]]',
    )
    (stage / "calls").touch()
    (stage / "silent").touch()
    assert _start(stage, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4").wait(timeout=30) == 1
    job = "7_4" if is_task else "9"  # else these variables belong to the job that submitted this one
    words = {
        f"update JobId={job} ExcNodeList=": "without ",
        f"update JobId={job} Comment=r1hpc: n1 does not see {stage}/run": "reason",
        f"hold {job}": "hold",
    }
    calls = _calls(stage)
    for said, short in words.items():
        calls = [call.replace(said, short) for call in calls]
    assert calls == (["reason"] if asked is None else [f"requeue Incomplete {job}", *asked])


@pytest.mark.parametrize(
    ("script", "state", "answers", "asked"),
    [
        ("job.sh", "RUNNING", ["busy", "busy", ""], ["requeue", "requeue", "requeue", "update ExcNodeList"]),
        ("job.sh", "RUNNING", ["presently disabled"], ["requeue", "sbatch"]),
        ("job.sh", "COMPLETING", ["presently disabled"], ["requeue"] * 44 + ["update Comment"]),  # cancelled
        ("train.sh", "RUNNING", ["presently disabled"], ["requeue", "update Comment"]),
        ("job.sh", "RUNNING", ["busy"], ["requeue"] * 44 + ["update Comment"]),
    ],
)
def test_a_node_that_does_not_see_the_run_asks_until_slurm_agrees(
    stage: Path, script: str, state: str, answers: list[str], asked: list[str]
) -> None:
    """A job.sh submits itself again if requeue is off."""
    shutil.rmtree(stage / "run")
    _program(stage / "sleep", "")
    for number, answer in enumerate(answers):
        (stage / f"answer{number}").write_text(answer)
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={state} ReqNodeList=(null) ExcNodeList=n5 Features="
    _program(
        stage / "scontrol",
        f"[ $2 = hostnames ] && exec seq 2\n[ $1 = show ] && exec echo '{shown}'\n"
        f"echo $1 ${{3%%=*}} $* >> {stage}/calls; [ $1 = requeue ] || exit 0\n"
        f"n=$(grep -c requeue {stage}/calls); [ $n -le {len(answers)} ] || n={len(answers)}\n"
        f"cat {stage}/answer$((n - 1)); [ ! -s {stage}/answer$((n - 1)) ]",
    )
    _program(stage / "sbatch", f"echo sbatch ${{SLURM_RESTART_COUNT:-}} $* >> {stage}/calls")
    if script == "job.sh":
        assert _start(stage, SLURM_RESTART_COUNT="2").wait(timeout=60) == 1
    else:
        _start_train(stage, SLURM_SUBMIT_DIR=str(stage / "unseen"))
    calls = [call.replace("requeue 9 requeue Incomplete 9", "requeue") for call in _calls(stage)]
    assert [" ".join(call.split()[:2]) if "update" in call else call.split()[0] for call in calls] == asked
    if "sbatch" in asked:
        assert calls[-1] == f"sbatch --dependency=afterany:9 --exclude=n5,n1 {stage}/job.sh"


@pytest.mark.parametrize(("restarts", "marks"), [(0, ["requeued-7"]), (1, [])])
def test_an_attempt_that_nobody_judged_says_if_the_requeue_was_ours(
    stage: Path, restarts: int, marks: list[str]
) -> None:
    (stage / "attempt").write_text("3\n")
    (stage / "run" / "attempts" / "3").mkdir(parents=True)
    _program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\nexit 1")
    _program(stage / "sleep", "")
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={['RUNNING', 'PENDING'][restarts]} Restarts={restarts} "
    _program(
        stage / "scontrol",
        f"[ $1 != show ] || exec echo '{shown}'\n"
        "[ $1 != requeue ] || { echo job is pending execution; exit 1; }",
    )
    assert _start(stage).wait(timeout=30) == 1
    assert [path.name for path in (stage / "run" / "attempts" / "3").iterdir()] == marks


if __name__ == "__main__":
    GOLDEN.write_text(golden_script())
