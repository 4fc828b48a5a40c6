"""Why Slurm ended a job: one table for the job script, Python and the documentation."""

import subprocess
from pathlib import Path

import pytest

from r1hpc.slurm.requeue import parse_job
from r1hpc.slurm.sacct import parse_records
from r1hpc.slurm.script import FUNCTIONS
from r1hpc.slurm.shell.endings import BY_SACCT, LOST, TABLE, of_states, with_table
from tests.slurm.shell import program

_SHOWN = (
    "JobId=9 JobName=JobState=RUNNING UserId=me(1) JobState={} Reason={} Restarts={} "
    "RunTime=00:02:00 TimeLimit=01:00:00 StartTime=9 EndTime={} Deadline=N/A PreemptTime={} SuspendTime=None"
)
# As Slurm 24.11 showed them: state, reason, restarts, end, PreemptTime; the shell's word; the cause.
_RECORDED = [
    (("RUNNING", "None", 0, 3700, "None"), "", None),
    (("RUNNING", "None", 0, 500, 490), "", None),  # the grace time
    (("COMPLETING", "None", 0, 220, "None"), "cancel", "cancelled"),
    (("COMPLETING", "None", 0, 220, 210), "cancel", "cancelled"),  # scancel in the grace time
    (("COMPLETING", "None", 0, 220, 220), "grace", "preempted"),
    (("COMPLETING", "TimeLimit", 0, 220, "None"), "limit", "timeout"),  # also the end of its reservation
    (
        (
            "COMPLETING",
            "Job_is_at_or_exceeds_QOS_x's_group_max_TRES(cpu)_minutes_of_1_with_1",
            0,
            220,
            "None",
        ),
        "limit",
        "timeout",
    ),
    (("COMPLETING", "NodeDown", 0, 220, "None"), "over", "node_fail"),
    (("NODE_FAIL", "NodeDown", 0, 220, "None"), "over", "node_fail"),
    (("OUT_OF_MEMORY", "OutOfMemory", 0, 220, "None"), "over", "oom"),
    (("DEADLINE", "DeadLine", 0, 220, "None"), "over", "timeout"),
    (("PENDING", "BeginTime", 1, 220, "None"), "requeue", "preempted"),
    (("COMPLETING", "NodeDown", 1, 220, "None"), "requeue", "node_fail"),
    (("RUNNING", "None", 1, 3700, "None"), "elsewhere", None),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The job script's word for each recorded answer."""
    folder = tmp_path_factory.mktemp("words")
    program(folder / "scontrol", f"cat {folder}/shown")
    found = []
    for fields, _, _ in _RECORDED:
        (folder / "shown").write_text(_SHOWN.format(*fields))
        environ = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": "9"}
        command = ["bash", "-c", f"RUN_DIR=; . {FUNCTIONS}; why_ending"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        found.append(done.stdout.strip())
    return found


@pytest.mark.parametrize("number", range(len(_RECORDED)))
def test_the_script_and_python_give_a_job_the_same_end(words: list[str], number: int) -> None:
    fields, word, cause = _RECORDED[number]
    assert words[number] == word
    row = parse_job(_SHOWN.format(*fields)).ending()
    assert (row.cause if row else None) == cause


@pytest.mark.parametrize("name", ["r1hpc/slurm/job.bash", "docs/preemption.md"])
def test_the_table_stands_where_it_is_read(name: str) -> None:
    """After a change: python -m r1hpc.slurm.shell.endings r1hpc/slurm/job.bash docs/preemption.md"""
    text = (Path(__file__).parents[2] / name).read_text()
    assert with_table(text) == text
    assert (TABLE[0].detail if name.endswith("md") else "COMPLETING/TimeLimit/*) echo limit") in text


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("CANCELLED by 1000", "cancelled"),
        ("CANCELLED by 0", "cancelled"),
        ("CANCELLED", "cluster"),  # slurmctld began without its saved state: nobody cancelled it
        ("NODE_FAIL", "node_fail"),
        ("TIMEOUT", "timeout"),
        ("PREEMPTED", "preempted"),
        ("DEADLINE", "timeout"),
        ("OUT_OF_MEMORY", "oom"),
        ("FAILED", None),
        ("COMPLETED", None),
    ],
)
def test_every_state_of_accounting_has_an_end(state: str, cause: str | None) -> None:
    (record,) = parse_records([f"7|{state}|100|200|100||1|n1|0:15|me|lab|gpu|normal|||demo"])
    row = of_states({record.ending})
    assert (row.cause if row else None) == cause
    assert record.ending in BY_SACCT
    assert record.state == state.split()[0]


def test_a_record_kept_by_an_earlier_version_was_cancelled_by_somebody() -> None:
    (record,) = parse_records(["7|CANCELLED|100|200|100||1|n1|0:15|me|lab|gpu|normal|||demo"])
    assert record.ending == LOST
    assert type(record)(**{**record.__dict__, "cancelled_by": None}).ending == "CANCELLED"
