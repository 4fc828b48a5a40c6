"""Ask the cluster what a run must know before submission: how it preempts, and what its nodes have.

Runs five commands at once, five seconds each. Unknown facts stay None; `unknown` names each command that
failed.
"""

import getpass
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.base.units import limit_s
from r1hpc.slurm.client import SlurmError, call

_TIMEOUT_S = 5.0
_QOS_FIELDS = "name,gracetime,preemptmode,preempt,maxwall,flags"
_ASSOC_FIELDS = "defaultqos,qos,maxwall,account,partition,cluster"


@dataclass(frozen=True)
class ClusterFacts:
    """Slurm's answers. None: unknown."""

    version: str | None = None
    partition: str | None = None
    """The requested one, else the default."""
    qos: str | None = None
    """The requested one, else the user's default."""
    preempt_type: str | None = None
    preempt_mode: str | None = None
    """For this partition and QOS; OFF if nobody can preempt it."""
    grace_s: int | None = None
    preemptors: tuple[tuple[str, str], ...] = ()
    """Pairs of QOS that the user may use: jobs of the first preempt those of the second (preempt/qos)."""
    kill_wait_s: int | None = None
    sends_user_signal: bool | None = None
    """A preemption also sends the job's --signal."""
    job_requeue: bool | None = None
    max_batch_requeue: int | None = None
    max_time_s: int | None = None
    """Limit of the partition, the first of several; None also if it has no limit."""
    max_wall_s: int | None = None
    """By the QOS, else by the user's association; a partition's QOS may have another."""
    is_routed: bool = False
    """A site's job_submit plugin may choose another partition for a job that names none."""
    num_nodes: int | None = None
    """Nodes of the one requested partition, in any state; unknown for the default one."""
    gpus_per_node: int | None = None
    """0: its nodes have none."""
    gpu_type: str | None = None
    unknown: tuple[str, ...] = ()
    """One sentence for each command that failed."""

    @property
    def reachable(self) -> bool:
        return self.preempt_type is not None


def probe_cluster(
    partition: str | None = None, qos: str | None = None, account: str | None = None
) -> ClusterFacts:
    """Return the facts for one partition (None: the default) and one QOS (None: the user's default). Raise
    UsageError with the existing partitions if there is no such one."""
    user = ["user=" + getpass.getuser(), *([f"account={account}"] if account else [])]
    answers = _ask(  # -a: hidden partitions can be used all the same
        {
            "config": ["scontrol", "show", "config"],
            "partitions": ["scontrol", "show", "partition", "-a", "-o"],
            "nodes": ["sinfo", "-a", "-h", "-o", "%R|%D|%G"],
            "qos": ["sacctmgr", "-nP", "show", "qos", f"format={_QOS_FIELDS}"],
            "default qos": ["sacctmgr", "-nP", "show", "assoc", *user, f"format={_ASSOC_FIELDS}"],
        }
    )
    said = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    failed = [f"{name}: {error}" for name, error in answers.items() if isinstance(error, SlurmError)]
    config = read_config(said.get("config", ""))
    fields = read_partition(said.get("partitions", ""), partition)
    name = fields.get("PartitionName", partition)
    associations = _associations(said.get("default qos", ""), name, config.get("ClusterName"))
    chosen_qos = qos or _default_qos(associations)
    rows = {row[0]: row for row in _split(said.get("qos", "")) if len(row) >= 4}
    qos_row = rows.get(chosen_qos or "", [])
    mode, grace = _preemption(config, fields, rows, chosen_qos)
    gpus, gpu_type = read_gpus(said.get("nodes"), name)
    signal = f"{config.get('PreemptParameters', '')},{config.get('SlurmctldParameters', '')}"
    return ClusterFacts(
        version=config.get("SLURM_VERSION"),
        partition=name,
        qos=chosen_qos,
        preempt_type=config.get("PreemptType"),
        preempt_mode=mode,
        grace_s=grace,
        preemptors=_preemptors(rows, associations),
        kill_wait_s=_count(config.get("KillWait")),
        sends_user_signal="send_user_signal" in signal if config else None,
        job_requeue=config["JobRequeue"] == "1" if "JobRequeue" in config else None,
        max_batch_requeue=_count(config.get("MaxBatchRequeue")),
        # With that flag the QOS's limit wins over the partition's.
        max_time_s=None if "PartitionTimeLimit" in "".join(qos_row[5:]) else limit_s(fields.get("MaxTime")),
        max_wall_s=_wall(qos_row, associations),
        is_routed=config.get("JobSubmitPlugins", "(null)") not in ("(null)", ""),
        num_nodes=_count(fields.get("TotalNodes")) if partition and "," not in partition else None,
        gpus_per_node=gpus,
        gpu_type=gpu_type,
        unknown=tuple(failed),
    )


def cluster_name(timeout_s: float = _TIMEOUT_S) -> str | None:
    """Return the name of the cluster of Slurm's commands; raise SlurmError if slurmctld does not answer."""
    return read_config(call(["scontrol", "show", "config"], timeout_s)).get("ClusterName")


def hides_jobs() -> bool:
    """True if users see only their own jobs (PrivateData=jobs), by slurmctld's configuration or slurmdbd's.
    False if neither has it, or answers."""
    answers = _ask(
        {"slurmctld": ["scontrol", "show", "config"], "slurmdbd": ["sacctmgr", "-n", "show", "configuration"]}
    )
    private = [read_config(said).get("PrivateData", "") for said in answers.values() if isinstance(said, str)]
    return any("jobs" in kinds.replace(" ", "").split(",") for kinds in private)


def read_config(text: str) -> dict[str, str]:
    """Return `scontrol show config` as a dictionary."""
    return {
        key.strip(): value.strip()
        for key, sign, value in (line.partition("=") for line in text.splitlines())
        if sign
    }


def read_partition(text: str, name: str | None) -> dict[str, str]:
    """Return the fields of one partition in `scontrol show partition -o`; of the default one for None. Raise
    UsageError if partitions are listed, but not `name`."""
    partitions = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]
    wanted = name.split(",")[0] if name else None
    for fields in partitions:
        if fields.get("PartitionName") == wanted or (wanted is None and fields.get("Default") == "YES"):
            return fields
    if wanted and partitions:
        known = ", ".join(fields.get("PartitionName", "?") for fields in partitions)
        raise UsageError(f"there is no partition {wanted!r}; there are: {known}")
    return {}


def read_gpus(text: str | None, partition: str | None) -> tuple[int | None, str | None]:
    """Return GPUs per node and their type in `sinfo -h -o %R|%D|%G`, those of most GPU nodes of the
    partition; 0 if none has GPUs."""
    if text is None:
        return None, None
    kinds: dict[tuple[int, str | None], int] = {}
    for row in _split(text):
        name, nodes, gres = (row + ["", ""])[:3]
        if partition is None or name == partition:
            kind = _gpus_in(gres)
            kinds[kind] = kinds.get(kind, 0) + int(nodes or 0)
    return max(kinds, key=lambda kind: (kind[0] > 0, kinds[kind], kind[0])) if kinds else (None, None)


def _ask(commands: Mapping[str, list[str]]) -> dict[str, str | SlurmError]:
    def one(argv: list[str]) -> str | SlurmError:
        try:
            return call(argv, _TIMEOUT_S)
        except SlurmError as error:
            return error

    with ThreadPoolExecutor(len(commands)) as pool:
        return dict(zip(commands, pool.map(one, commands.values()), strict=True))


def _preemption(
    config: Mapping[str, str],
    partition: Mapping[str, str],
    rows: Mapping[str, Sequence[str]],
    qos: str | None,
) -> tuple[str | None, int | None]:
    """Return a job's PreemptMode and GraceTime, the QOS's or the partition's (slurm.conf(5), PreemptType)."""
    kind = config.get("PreemptType")
    if kind is None:
        return None, None
    if kind == "preempt/none":
        return "OFF", 0
    if kind == "preempt/partition_prio":
        return partition.get("PreemptMode", config.get("PreemptMode")), _count(partition.get("GraceTime"))
    if qos is None or qos not in rows:
        return config.get("PreemptMode"), None
    if not any(qos in row[3].split(",") for row in rows.values()):
        return "OFF", 0  # no QOS may preempt this one
    _, grace, mode, *_ = rows[qos]
    return (config.get("PreemptMode") if mode in ("", "cluster") else mode.upper()), limit_s(grace) or 0


def _preemptors(
    rows: Mapping[str, Sequence[str]], associations: Sequence[Sequence[str]]
) -> tuple[tuple[str, str], ...]:
    own = {qos for row in associations for qos in row[1].split(",")}
    pairs = ((name, victim) for name in sorted(own & set(rows)) for victim in rows[name][3].split(","))
    return tuple((name, victim) for name, victim in pairs if victim in own)


def _split(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.splitlines()]


def _associations(text: str, partition: str | None, cluster: str | None) -> list[list[str]]:
    """Return the user's associations for jobs in this partition; columns are _ASSOC_FIELDS. One slurmdbd may
    serve several clusters, and lists them all."""
    rows = [row for row in _split(text) if len(row) > 5]
    return [row for row in rows if row[4] in ("", partition) and cluster in (None, row[5])]


def _wall(qos_row: Sequence[str], associations: Sequence[Sequence[str]]) -> int | None:
    """Return the wall limit of a QOS, else of the user's association, which is Slurm's order. None: there is
    none, or the user has several accounts and the job names none."""
    own = limit_s(next(iter(qos_row[4:5]), None))
    if own:
        return own
    if len({row[3] for row in associations}) > 1:
        return None
    return min((limit for row in associations if (limit := limit_s(row[2]))), default=None)


def _default_qos(associations: Sequence[Sequence[str]]) -> str | None:
    """Return the default QOS of the user's association; without one, the only allowed one. None: there is
    none, or the user has several accounts, they differ in it, and the job names none."""
    defaults = {default or ("" if "," in allowed else allowed) for default, allowed, *_ in associations}
    return (defaults.pop() or None) if len(defaults) == 1 else None


def _gpus_in(gres: str) -> tuple[int, str | None]:
    """Parse GPUs: ("gpu:a100:4(S:0-1),nvme:1") -> (4, "a100")."""
    count, kind = 0, None
    for found in re.finditer(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?=[(,]|$)", gres):
        count += int(found[2])
        kind = kind or found[1]
    return count, kind


def _count(text: str | None) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None
