"""What Slurm charged: every record of a job, one per attempt, and the GPUs in it.

`sacct` hides the earlier attempts of a requeued job unless it is given -D: without it the GPU-hours of
everything before the last preemption are missing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from r1hpc.base.errors import StateError
from r1hpc.slurm.client import call

# JobName is last: it may hold the separator.
FIELDS = (
    "JobID,State,Start,End,ElapsedRaw,AllocTRES,NNodes,NodeList,ExitCode,Restarts,"
    "User,Account,Partition,QOS,Submit,Eligible,JobName"
)


@dataclass(frozen=True)
class JobRecord:
    """One line of `sacct -D -X`: one attempt. Times are Unix seconds."""

    job_id: str
    state: str
    """Slurm's word alone: CANCELLED, not "CANCELLED by 1000"."""
    start: float | None
    """None: it never started."""
    end: float | None
    """None: it still runs."""
    elapsed_s: int
    gpus: int
    nodes: int
    node_list: str
    exit_code: str
    restarts: int
    user: str
    account: str
    partition: str
    qos: str
    job_name: str
    eligible: float | None = None
    """When it could have started, had there been room: what it waited for since then is the queue."""


def sacct_records(job_id: str, since: float | None = None, timeout_s: float = 30.0) -> list[JobRecord]:
    """Every record of a job, oldest first.

    Args:
        since: Unix seconds; records that ended before are left out. None: from the job's start.

    Raises:
        SlurmError: sacct or slurmdbd did not answer.
        StateError: sacct printed something else.
    """
    argv = ["sacct", "-D", "-X", "-P", "-n", "-j", job_id, "-o", FIELDS]
    if since is not None:
        argv += ["-S", f"uts{int(since)}"]
    return parse_records(call(argv, timeout_s).splitlines())


def parse_records(lines: Sequence[str]) -> list[JobRecord]:
    """The records in sacct's output, its columns being FIELDS."""
    return [_record(line) for line in lines if line.strip()]


def gpus_of(alloc_tres: str) -> int:
    """GPUs in an AllocTRES such as "billing=4,cpu=4,gres/gpu:a100=8,gres/gpu=8,node=4", each counted once.

    Slurm lists the total and, beside it, the same GPUs by type; some sites configure only one of them.
    """
    total = re.search(r"(?:^|,)gres/gpu=(\d+)", alloc_tres)
    if total:
        return int(total[1])
    return sum(int(count) for count in re.findall(r"(?:^|,)gres/gpu:[^=,]+=(\d+)", alloc_tres))


def _record(line: str) -> JobRecord:
    parts = line.split("|", FIELDS.count(","))
    if len(parts) != FIELDS.count(",") + 1:
        raise StateError(
            f"sacct printed a line of {len(parts)} fields where {FIELDS} was asked for: {line!r}"
        )
    job_id, state, start, end, elapsed, tres, nodes, node_list, code, restarts, *who, name = parts
    user, account, partition, qos, submit, eligible = who
    return JobRecord(
        job_id=job_id,
        state=state.split(" ")[0],
        start=_time(start),
        end=_time(end),
        elapsed_s=int(elapsed or 0),
        gpus=gpus_of(tres),
        nodes=int(nodes or 0),
        node_list=node_list,
        exit_code=code,
        restarts=int(restarts or 0),
        user=user,
        account=account,
        partition=partition,
        qos=qos,
        job_name=name,
        eligible=_time(eligible) or _time(submit),
    )


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() and text != "0" else None
