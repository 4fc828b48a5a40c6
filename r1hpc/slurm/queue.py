"""Read Slurm's queue (running and waiting jobs, jobs by folder) and its GPU limits; set jobs' dependencies.

GPU limits are GrpTRESMins of accounts and QOS. `scontrol show assoc_mgr` prints each limit with its usage, as
`gres/gpu=600(12)` in GPU-minutes (N: no limit).

The usage decays by PriorityDecayHalfLife unless that is 0 or the QOS has NoDecay (slurm.conf(5)), so Slurm's
remainder may be more than hours minus hours. Slurm enforces its own number, so that one is used here.
"""

import functools
import getpass
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.units import limit_s
from r1hpc.slurm import fields
from r1hpc.slurm.client import call
from r1hpc.slurm.gres import NO_SHARES, Shares, gpus_by_type, plain, unknown_shares

# tres-alloc is a waiting job's request, and unlike %b it knows --gpus.
_FIELDS = ("JobArrayID", "State", "tres-alloc", "TimeLimit", "TimeUsed")
_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
_LIMIT = re.compile(r"(?:^|,)(gres/gpu(?::[^=,]+)?)=(N|\d+)\((\d+)\)")
_KEYS = r"\b(Account|UserName|QOS|ParentAccount|GrpTRESMins|GrpTRESRunMins)=(\S*)"


@dataclass(frozen=True)
class QueuedJob:
    """One job that runs or waits; a waiting array counts once for each of its tasks."""

    job_id: str
    state: str
    gpus: float
    time_limit_s: int | None
    """None: it has no limit."""
    elapsed_s: int
    unshared: frozenset[str] = frozenset()
    """`shard` or `mps` that it holds and that count as no GPU: nothing tells how many make one."""

    @property
    def is_pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def most_left(self) -> float | None:
        """Return the GPU-hours until its time limit."""
        if self.time_limit_s is None:
            return None
        return self.gpus * max(0, self.time_limit_s - self.elapsed_s) / 3600


def ask_squeue(account: str, shares: Shares = NO_SHARES) -> list[QueuedJob]:
    """Return the jobs of an account; raise SlurmError if squeue or slurmctld does not answer. `shares`: see
    gpus_by_type."""
    columns = ",".join(f"{field}:|" for field in _FIELDS)
    return read_squeue(call(["squeue", "-h", "-r", "-a", "-O", columns, f"-A{account}"], 10.0), shares)


def read_squeue(text: str, shares: Shares = NO_SHARES) -> list[QueuedJob]:
    """Parse squeue's output in the columns above; jobs that are over but still listed are left out."""
    rows = [line.rstrip().removesuffix("|").split("|") for line in text.split("\n")]
    held = functools.cache(lambda tres: plain(sum(gpus_by_type(tres, shares).values())))
    unshared = functools.cache(lambda tres: frozenset(unknown_shares(tres, shares)))
    return [
        QueuedJob(job_id, state, held(tres), limit_s(limit), limit_s(elapsed) or 0, unshared(tres))
        for job_id, state, tres, limit, elapsed in (row for row in rows if len(row) == len(_FIELDS))
        if state not in _OVER
    ]


def after_all_ok(job_ids: Sequence[str], also: str | None = None) -> dict[str, str]:
    """Return sbatch options for a job that may begin once all of `job_ids` have exited with status 0.

    If a predecessor fails, Slurm cancels the job instead of letting it wait forever. `also` is the user's own
    dependency, which stays in force.
    """
    if not job_ids:
        return {}
    ours = "afterok:" + ":".join(job_ids)
    return {
        "dependency": fields.check("dependency", f"{also},{ours}" if also else ours),
        "kill-on-invalid-dep": "yes",
    }


def move(job_id: str, after: Sequence[str], also: str | None = None) -> None:
    """Make a waiting job wait for other jobs instead. Raise SlurmError if it no longer waits, or slurmctld
    does not answer."""
    options = after_all_ok(after, also)
    call(["scontrol", "update", f"JobId={job_id}", f"Dependency={options['dependency']}"], 20.0)


def jobs_by_folder(all_states: bool = False) -> dict[Path, list[str]]:
    """Return the start folder of the caller's waiting and running jobs, with their ids.

    Every job of a run starts in the run's folder, so this finds a job whose submission was interrupted before
    its id was saved. With `all_states` also jobs that have ended, as long as slurmctld remembers them
    (MinJobAge). Raise SlurmError if it does not answer.
    """
    # The folder last: it may hold spaces.
    states = ["-t", "all"] if all_states else []
    lines = call(["squeue", "--me", "-h", "-o", "%A %Z", "-a", *states], 20.0).splitlines()
    found: dict[Path, list[str]] = {}
    for line in lines:
        job_id, _, folder = line.strip().partition(" ")
        found.setdefault(Path(folder), []).append(job_id)
    return found


@dataclass(frozen=True)
class TresLimit:
    """One GrpTRESMins of GPUs, in GPU-hours."""

    kind: str
    """`account` or `qos`."""
    name: str
    user: str
    """Empty: the limit is the account's or QOS's."""
    tres: str
    """gres/gpu, or one type of it such as gres/gpu:a100."""
    gpu_hours: float
    used: float
    """As counted by Slurm, decay included."""
    running: float
    """Remaining time limits of running jobs: Slurm reserves these hours for them."""

    @property
    def unused(self) -> float:
        """Return the limit minus the usage: hours reserved for running jobs may come back."""
        return max(0.0, self.gpu_hours - self.used)

    @property
    def left(self) -> float:
        """Return the hours Slurm would still let start: the limit minus usage and reservations."""
        return max(0.0, self.gpu_hours - self.used - self.running)

    @property
    def card(self) -> str | None:
        """Return the only type of GPU that is counted, by the site's name; None: every GPU is."""
        return self.tres.partition(":")[2] or None

    @property
    def owner(self) -> str:
        return f"{self.kind} {self.name}" + (f", user {self.user}" if self.user else "")


def gpu_limits(account: str | None, qos: str | None = None) -> list[TresLimit]:
    """Return the GPU limits of an account, its parents and a QOS; all that this user may see for None, None.
    Raise SlurmError if slurmctld does not answer, or hides them."""
    text = call(["scontrol", "-o", "show", "assoc_mgr", "flags=assoc,qos"], 10.0)
    return read_assoc_mgr(text, account, qos, getpass.getuser())


def read_assoc_mgr(
    text: str, account: str | None, qos: str | None = None, user: str | None = None
) -> list[TresLimit]:
    """Parse the limits in `scontrol -o show assoc_mgr flags=assoc,qos`.

    Args:
        account: and its parents, several separated by commas; None: all and all QOS, or no account if `qos`
            is given, since the default account's limits are not known here.
        user: limits of other users alone are left out; None: none are.
    """
    rows = [dict(re.findall(_KEYS, line)) for line in text.splitlines()]
    accounts = [row for row in rows if row.get("Account") and not row.get("UserName")]
    parents = {row["Account"].lower(): row.get("ParentAccount", "").split("(")[0].lower() for row in accounts}
    wanted: set[str] = set()
    for name in (account or "").split(","):
        above: str | None = name.strip().lower()  # as Slurm keeps the names of accounts
        while above and above not in wanted:
            wanted.add(above)
            above = parents.get(above)
    found: list[TresLimit] = []
    for row in rows:
        owner = row.get("UserName", "").split("(")[0]
        if row.get("QOS"):
            name = row["QOS"].split("(")[0]
            if qos == name or (qos is None and account is None):
                found += _limits("qos", name, "", row)
        elif (account is not None or qos is None) and (not owner or user in (None, owner)):
            name = row.get("Account", "")
            if name and (account is None or name.lower() in wanted):
                found += _limits("account", name, owner, row)
    return found


def _limits(kind: str, name: str, user: str, row: dict[str, str]) -> Sequence[TresLimit]:
    running = {tres: int(used) / 60 for tres, _, used in _LIMIT.findall(row.get("GrpTRESRunMins", ""))}
    return [
        TresLimit(kind, name, user, tres, int(limit) / 60, int(used) / 60, running.get(tres, 0.0))
        for tres, limit, used in _LIMIT.findall(row.get("GrpTRESMins", ""))
        if limit != "N"
    ]
