"""The job script where Python cannot: it asks for the next attempt, keeps off a node, or holds the job."""

import shutil
from pathlib import Path

import pytest

from r1hpc.slurm.shell.contract import NOT_THE_NODE
from tests.slurm.shell import SHOWN, calls_of, program, start, start_train


@pytest.mark.parametrize(
    ("shown", "asked"),
    [
        (SHOWN.format("RUNNING", 0, "None"), "requeue Incomplete 9"),
        (SHOWN.format("RUNNING", 0, "5"), "requeue Incomplete 9"),
        (SHOWN.format("COMPLETING", 0, "9"), "requeue 9"),  # the end of a grace time
        ("", "requeue Incomplete 9"),  # no answer
        (SHOWN.format("NODE_FAIL", 0, "None"), "requeue 9"),  # slurmd was lost, and this script lives on
        (SHOWN.format("COMPLETING", 0, "5"), ""),  # scancel in the grace time
        (SHOWN.format("COMPLETING", 0, "None"), ""),  # scancel
        (SHOWN.format("CANCELLED", 0, "None"), ""),
        (SHOWN.format("COMPLETING", 1, "None"), ""),  # Slurm has requeued it
        (SHOWN.format("PENDING", 1, "None"), ""),
        (
            SHOWN.format("RUNNING", 1, "None"),
            "",
        ),  # and has started it elsewhere
        # Another node is lost, and the job may not be requeued.
        (SHOWN.format("COMPLETING Reason=NodeDown", 0, "None"), "requeue 9"),
    ],
)
@pytest.mark.parametrize("killed", ["kill -KILL $$", "exit 1"])
def test_the_shell_asks_for_the_next_attempt_where_python_cannot(
    stage: Path, killed: str, shown: str, asked: str
) -> None:
    (stage / "attempt").write_text("3\n")
    program(stage / "srun", "exit 0")
    program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\n{killed}")
    (stage / "shown").write_text(shown)
    pending = SHOWN.format("PENDING", 1, "None")
    program(
        stage / "scontrol",
        f"[ $1 != show ] || exec cat {stage}/shown\necho $* >> {stage}/requeues\n"
        f"echo '{pending}' > {stage}/shown",
    )
    (stage / "requeues").touch()
    assert start(stage).wait(timeout=30) == 1
    assert (stage / "requeues").read_text().strip() == asked


def test_the_shell_does_not_undo_a_scancel_between_its_look_and_the_requeue(stage: Path) -> None:
    """Slurm says nothing, and does nothing."""
    (stage / "attempt").write_text("3\n")
    program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\nexit 1")
    (stage / "shown").write_text(SHOWN.format("RUNNING", 0, "None"))
    cancelled = SHOWN.format("COMPLETING", 0, "None")
    program(
        stage / "scontrol",
        f"[ $1 != show ] || exec cat {stage}/shown\necho $* >> {stage}/requeues\n"
        f"echo '{cancelled}' > {stage}/shown",
    )
    assert start(stage).wait(timeout=30) == 1
    assert (stage / "requeues").read_text() == "requeue Incomplete 9\n"
    assert "job 9 was cancelled: not run again" in (stage / "run/logs/slurm-9.out").read_text()


def _fails_to_begin(stage: Path, status: int, pinned: str = "(null)") -> list[str]:
    """Return the shell's calls of scontrol when each `begin` leaves with this status and a reason."""
    program(stage / "python", f"echo 'Disk quota exceeded: /runs'; exit {status}")
    program(stage / "sleep", "")
    shown = f"JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ReqNodeList={pinned} ExcNodeList=(null) End=1"
    program(
        stage / "scontrol",
        f"[ $1 != show ] || {{ [ $2 = hostnames ] && echo n1 || echo '{shown}'; exit; }}\n"
        f"echo $* >> {stage}/calls",
    )
    assert start(stage).wait(timeout=30) == 1
    return calls_of(stage)


def test_the_disk_of_the_run_is_no_fault_of_a_node(stage: Path) -> None:
    """It is tried again as any begin that fails, and then held with the reason."""
    asked = _fails_to_begin(stage, NOT_THE_NODE)
    assert asked[-2:] == ["hold 9", "update JobId=9 Comment=r1hpc: Disk quota exceeded: /runs"]
    assert "requeue Incomplete 9" in asked
    assert not [call for call in asked if "ExcNodeList" in call]
    last = (stage / "run/logs/slurm-9.out").read_text().splitlines()[-1]
    assert last == "job 9 is held: Disk quota exceeded: /runs. scontrol release 9 lets it go on"


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        ("echo 'Read-only file system: /runs'; exit 5", "Read-only file system: /runs"),
        ("exit 5", "the disk of the run cannot be written"),
        ("exit 127", "{stage}/python cannot be started"),
        ("exit 126", "{stage}/python cannot be started"),
    ],
)
def test_the_same_words_on_a_second_node_hold_the_job_and_blame_none(
    stage: Path, begin: str, words: str
) -> None:
    """The first node is left out once. If the second one says the same, the first may be used again."""
    program(stage / "python", begin)
    program(stage / "sleep", "")
    words = words.format(stage=stage)
    asked = _with_job_record(stage, "n5", "(null)", node="n1")
    assert asked[-1] == "update JobId=9 ExcNodeList=n5,n1"
    assert f"update JobId=9 Comment=r1hpc: n1 cannot begin: {words}" in asked
    (stage / "calls").unlink()

    asked = _with_job_record(stage, "n5,n1", f"r1hpc: n1 cannot begin: {words}", node="n2")
    assert asked[-3:] == [
        "hold 9",
        "update JobId=9 ExcNodeList=n5",
        f"update JobId=9 Comment=r1hpc: {words}, on n1 and n2",
    ]
    (stage / "calls").unlink()

    asked = _with_job_record(stage, "n5,n1", "r1hpc: n1 cannot begin: other words", node="n2")
    assert asked[-1] == "update JobId=9 ExcNodeList=n5,n1,n2"


def _with_job_record(stage: Path, excluded: str, comment: str, node: str) -> list[str]:
    shown = f"JobId=9 UserId=me(1) JobState=RUNNING Restarts=0 ReqNodeList=(null) ExcNodeList={excluded} "
    program(
        stage / "scontrol",
        f"[ \"$1 $2\" != 'show hostnames' ] || {{ tr , '\\n' <<< $3; exit; }}\n"
        f"[ $1 != show ] || {{ echo '{shown}Comment={comment} StdErr=x'; exit; }}\necho $* >> {stage}/calls",
    )
    assert start(stage, SLURMD_NODENAME=node).wait(timeout=30) == 1
    return [call for call in calls_of(stage) if not call.startswith("python")]


def test_missing_code_is_no_fault_of_a_node(stage: Path) -> None:
    (stage / "run/config.yaml").touch()
    (stage / "run/code/r1hpc/launch.py").unlink()
    asked = _fails_to_begin(stage, 1)
    assert asked[-1] == f"update JobId=9 Comment=r1hpc: the frozen code is incomplete: {stage}/run/code"
    (stage / "run/code/r1hpc/slurm/job.bash").unlink()
    asked = _fails_to_begin(stage, 1)
    assert asked[-2:] == [
        "hold 9",
        f"update JobId=9 Comment=r1hpc: {stage}/run lacks code/r1hpc/slurm/job.bash, which it froze",
    ]
    assert not [call for call in asked if "ExcNodeList" in call]


def test_a_log_that_cannot_be_written_is_for_begin_to_tell(stage: Path) -> None:
    (stage / "run/logs/slurm-9.out").mkdir()
    asked = _fails_to_begin(stage, NOT_THE_NODE)
    assert asked[-2:] == ["hold 9", "update JobId=9 Comment=r1hpc: Disk quota exceeded: /runs"]


def test_the_end_hands_over_the_reason_of_a_hold(stage: Path) -> None:
    (stage / "attempt").write_text("3\n")
    end = "echo said >&1; echo -n 'srun started no rank' >&$R1HPC_REASON_FD; exit 4"
    program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\n{end}")
    program(stage / "srun", "exit 1")
    program(stage / "sleep", "")
    shown = SHOWN.format("RUNNING", 0, "None")
    program(stage / "scontrol", f"[ $1 != show ] || exec echo '{shown}'\necho $* >> {stage}/requeues")
    assert start(stage).wait(timeout=60) == 1
    assert (stage / "requeues").read_text().splitlines()[-2:] == [
        "hold 9",
        "update JobId=9 Comment=r1hpc: srun started no rank",
    ]
    assert "said\n" in (stage / "run/logs/slurm-9.out").read_text()


@pytest.mark.parametrize("mode", [0o666, 0o602])
def test_a_file_deep_in_the_code_that_others_may_write_does_not_run(stage: Path, mode: int) -> None:
    (stage / "run/code/r1hpc/deep.py").touch()
    (stage / "run/code/r1hpc/deep.py").chmod(mode)
    program(stage / "scontrol", f"echo $* >> {stage}/calls")
    assert start(stage).wait(timeout=30) == 1
    (asked,) = calls_of(stage)
    assert asked.endswith("is another user's, or others may write it: not run")


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
    program(stage / "sleep", "")
    task = "ArrayJobId=7 ArrayTaskId=4 " if is_task else ""
    shown = f"JobId=9 {task}JobName=x UserId=me(1) {nodes} Features=(null)"
    program(
        stage / "scontrol",
        f"[ $2 = hostnames ] && exec seq {count}\n"
        f"if [ $1 = show ]; then echo '{shown}'; mv {stage}/silent {stage}/answers && exit 1; exit 0; fi\n"
        f'echo $* >> {stage}/calls; [[ "$*" != *{refused}=* && $1 != {refused} ]]',
    )
    (stage / "calls").touch()
    (stage / "silent").touch()
    assert start(stage, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4").wait(timeout=30) == 1
    job = "7_4" if is_task else "9"  # else these variables belong to the job that submitted this one
    words = {
        f"update JobId={job} ExcNodeList=": "without ",
        f"update JobId={job} Comment=r1hpc: n1 does not see {stage}/run": "reason",
        f"hold {job}": "hold",
    }
    calls = calls_of(stage)
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
    program(stage / "sleep", "")
    for number, answer in enumerate(answers):
        (stage / f"answer{number}").write_text(answer)
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={state} ReqNodeList=(null) ExcNodeList=n5 Features="
    program(
        stage / "scontrol",
        f"[ $2 = hostnames ] && exec seq 2\n[ $1 = show ] && exec echo '{shown}'\n"
        f"echo $1 ${{3%%=*}} $* >> {stage}/calls; [ $1 = requeue ] || exit 0\n"
        f"n=$(grep -c requeue {stage}/calls); [ $n -le {len(answers)} ] || n={len(answers)}\n"
        f"cat {stage}/answer$((n - 1)); [ ! -s {stage}/answer$((n - 1)) ]",
    )
    program(stage / "sbatch", f"echo sbatch ${{SLURM_RESTART_COUNT:-}} $* >> {stage}/calls")
    if script == "job.sh":
        assert start(stage, SLURM_RESTART_COUNT="2").wait(timeout=60) == 1
    else:
        start_train(stage, SLURM_SUBMIT_DIR=str(stage / "unseen"))
    calls = [call.replace("requeue 9 requeue Incomplete 9", "requeue") for call in calls_of(stage)]
    assert [" ".join(call.split()[:2]) if "update" in call else call.split()[0] for call in calls] == asked
    if "sbatch" in asked:
        assert calls[-1] == f"sbatch --dependency=afterany:9 --exclude=n5,n1 {stage}/job.sh"


@pytest.mark.parametrize(("restarts", "marks"), [(0, ["requeued-7"]), (1, [])])
def test_an_attempt_that_nobody_judged_says_if_the_requeue_was_ours(
    stage: Path, restarts: int, marks: list[str]
) -> None:
    (stage / "attempt").write_text("3\n")
    (stage / "run" / "attempts" / "3").mkdir(parents=True)
    program(stage / "python", f"[ $3 = begin ] && exec cat {stage}/attempt\nexit 1")
    program(stage / "sleep", "")
    shown = f"JobId=9 JobName=x UserId=me(1) JobState={['RUNNING', 'PENDING'][restarts]} Restarts={restarts} "
    program(
        stage / "scontrol",
        f"[ $1 != show ] || exec echo '{shown}'\n"
        "[ $1 != requeue ] || { echo job is pending execution; exit 1; }",
    )
    assert start(stage).wait(timeout=30) == 1
    assert [path.name for path in (stage / "run" / "attempts" / "3").iterdir()] == marks
