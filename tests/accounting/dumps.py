"""What `sacct -D -X -P` prints on a busy cluster, made from a seed, and what it adds up to by construction.

    truth = write_dump(path, num_records=1_000_000, seed=1)
    truth.gpu_seconds, truth.by["user"]["u017"]        # integers
    write_dump(path, 1_000_000, seed=1, columns=ODD_COLUMNS, odd=True)

`odd` adds three clusters that use the same job IDs, MIG slices of A100 and A30, shards, MPS, and rows that no
reader can use; truth is then in 1/UNIT of a GPU-second.

Requeued jobs, arrays, heterogeneous jobs, names that hold the separator, jobs without GPUs, jobs that run,
wait or never started, GPUs listed by type, in total or both, records that stand there twice. Times are local,
as sacct prints them. The sums are made here, record by record, without anything of r1hpc.
"""

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = (
    "JobID",
    "JobName",
    "User",
    "Account",
    "Partition",
    "QOS",
    "State",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "NNodes",
    "AllocTRES",
    "ExitCode",
    "NodeList",
)
ODD_COLUMNS = (*COLUMNS, "Cluster")
CLUSTERS = ("alps", "berg", "coast")
SHARES = {"shard": 6, "mps": 100}
UNIT = 2100
"""Sevenths, quarters, sixths (shards) and hundredths (MPS) of a GPU are whole numbers of it."""
KINDS = {
    "gres/gpu:a100": ("a100", 2100),
    "gres/gpu:h100": ("h100", 2100),
    "gres/gpu:a100_3g.20gb": ("a100_3g.20gb", 900),
    "gres/gpu:1g.10gb": ("1g.10gb", 300),
    "gres/gpu:2g.12gb": ("2g.12gb", 1050),
    "gres/shard": ("shard", 350),
    "gres/mps": ("mps", 21),
}
_BAD = "9|x|ada|lab|gpu|normal|COMPLETED|Unknown|{}|Unknown|60|1|{}|0:0|n|alps"
BAD = (
    "77|torn",
    "the end of a job name",
    _BAD.format("2026-12-31T23:59:60", "gres/gpu=4"),
    _BAD.format("2026-12-31T23:59:10", "cpu=1, gres/gpu=4"),
)
NAMES = ("train", "bash", "sweep|lr=3e-4|x", "a|b", "|", "eval|", "grpo-7b", "übung", "")
ENDED = ("COMPLETED", "COMPLETED", "COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY")
REQUEUED = ("PREEMPTED", "NODE_FAIL", "REQUEUED")
CAUSES = {"OUT_OF_MEMORY": "oom", "REQUEUED": "preempted"}


@dataclass
class Truth:
    """Seconds x GPUs, by key; `node_seconds` likewise."""

    gpu_seconds: int = 0
    node_seconds: int = 0
    by: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    billing: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    num_bad: int = 0
    num_records: int = 0
    """Different ones that started."""
    records: list[tuple[dict[str, str], int, int, int, str]] | None = None
    """Each of them: row, start, seconds, GPUs, type of GPU."""

    def count(
        self, row: dict[str, str], start: int, elapsed: int, gpus: int, nodes: int, kind: str = "unknown"
    ) -> None:
        self.num_records += 1
        if self.records is not None:
            self.records.append((dict(row), start, elapsed, gpus, kind if gpus else "none"))
        self.gpu_seconds += gpus * elapsed
        self.node_seconds += nodes * elapsed
        billing = int(row["AllocTRES"].partition("billing=")[2].partition(",")[0])
        self.billing["user"][row["User"]] += billing * elapsed
        self.billing["account"][row["Account"]] += billing * elapsed
        state = row["State"].split(" ")[0]
        for key, value in (("user", row["User"]), ("account", row["Account"]), ("state", state)):
            self.by[key][value] += gpus * elapsed
        for key, value in (("qos", row["QOS"]), ("partition", row["Partition"])):
            self.by[key][value] += gpus * elapsed
        self.by["cluster"][row["Cluster"] or "unknown"] += gpus * elapsed
        self.by["cause"][CAUSES.get(state, state.lower())] += gpus * elapsed
        if gpus:
            self.by["gpu_type"][kind] += gpus * elapsed
            for day, seconds in _days(start, start + elapsed):
                self.by["day"][day] += gpus * seconds
                self.by["month"][day[:7]] += gpus * seconds


def write_dump(
    path: Path,
    num_records: int,
    seed: int,
    columns: Sequence[str] = COLUMNS,
    every_s: int = 40,
    odd: bool = False,
    keep: bool = False,
) -> Truth:
    """About `num_records` lines, the oldest first but for those that stand there twice.

    Args:
        every_s: a job begins at most so long after the one before.
        keep: keep each record.
    """
    choose, truth = random.Random(seed), Truth(records=[] if keep else None)
    again: list[str] = []
    with path.open("w") as file:
        file.write("|".join(columns) + "\n")
        lines = 0
        for text, once in _lines(choose, truth, columns, every_s, odd):
            file.write(text)
            lines += 1
            if odd and choose.random() < 0.001:
                file.write(choose.choice(BAD) + "\n")
                truth.num_bad += 1
            if not once:
                again.append(text)
            if len(again) > 50 or lines >= num_records:
                file.writelines(again)
                lines += len(again)
                again.clear()
            if lines >= num_records:
                break
    return truth


def _lines(
    choose: random.Random, truth: Truth, columns: Sequence[str], every_s: int, odd: bool
) -> Iterator[tuple[str, bool]]:
    """(line, False where it shall be repeated later)."""
    clock, job = 1_735_000_000, 4_000_000
    used: dict[int, set[str]] = defaultdict(set)
    users = [(f"u{i:03d}", f"lab{i % 37}") for i in range(240)]
    while True:
        job += choose.randint(1, 3)
        user, account = users[int(choose.triangular(0, 239, 0))]
        row = {
            "User": user,
            "Account": account,
            "Partition": choose.choice(("gpu", "gpu", "long", "scavenger", "cpu")),
            "QOS": choose.choice(("normal", "normal", "high", "scavenger")),
            "JobName": choose.choice(NAMES),
            "ExitCode": "0:0",
            "Cluster": choose.choice(CLUSTERS) if odd else "",
        }
        if odd and choose.random() < 0.3 and row["Cluster"] not in used[job - 1]:
            job -= 1  # another cluster's job with the same ID
        if odd:
            used[job].add(row["Cluster"])
        for job_id in _job_ids(choose, job):
            clock += choose.randint(0, every_s)
            yield from _attempts(choose, truth, columns, {**row, "JobID": job_id}, clock)


def _job_ids(choose: random.Random, job: int) -> list[str]:
    kind = choose.random()
    if kind < 0.04:
        return [f"{job}_{task}" for task in range(choose.randint(2, 60))]
    if kind < 0.06:
        return [f"{job}+0", f"{job}+1"]
    return [f"{job}"]


def _attempts(
    choose: random.Random, truth: Truth, columns: Sequence[str], row: dict[str, str], clock: int
) -> Iterator[tuple[str, bool]]:
    gpus = choose.choice((0, 0, 1, 1, 2, 4, 8, 8, 64)) if row["Partition"] != "cpu" else 0
    nodes = max(1, gpus // 8)
    row |= {"NNodes": str(nodes), "NodeList": f"gpu[{100 + choose.randint(0, 800)}]"}
    kind = choose.random()
    if kind < 0.03:
        never = {"State": choose.choice(("PENDING", f"CANCELLED by {choose.randint(1000, 1400)}"))}
        row |= {"Start": choose.choice(("Unknown", "None")), "End": "Unknown", "ElapsedRaw": "0"}
        yield _line(row | never | {"AllocTRES": "", "Submit": _local(clock)}, columns), choose.random() > 0.01
        return
    requeues = choose.choice((1, 1, 2, 5)) if kind < 0.08 else 0
    for attempt in range(requeues + 1):
        clock += choose.randint(1, 9000)
        elapsed = min(int(choose.lognormvariate(7.5, 2.0)), 10 * 86400)
        row["State"] = REQUEUED[attempt % 3] if attempt < requeues else choose.choice(ENDED)
        if kind > 0.99:
            row["State"] = f"CANCELLED by {choose.randint(1000, 1400)}"
        row |= {
            "Submit": _local(clock - wait_of(clock)),
            "Start": _local(clock),
            "End": _local(clock + elapsed),
        }
        row |= {"ElapsedRaw": str(elapsed)}
        if row["Cluster"] and gpus:
            gres, (gpu_type, units) = choose.choice(list(KINDS.items()))
            row["AllocTRES"] = f"billing=4,cpu=4,{gres}={gpus},mem=16G,node={nodes}"
            truth.count(row, clock, elapsed, gpus * units, nodes, gpu_type)
        else:
            row["AllocTRES"], gpu_type = _tres(choose, gpus, nodes)
            truth.count(row, clock, elapsed, gpus, nodes, gpu_type)
        is_clear = not _is_repeated_hour(clock)
        if choose.random() < 0.005 and is_clear:  # seen while it ran, and again when it was over
            young = {"State": "RUNNING", "End": "Unknown", "ElapsedRaw": str(elapsed // 2)}
            yield _line(row | young, columns), True
        yield _line(row, columns), choose.random() > 0.01
        clock += elapsed


def wait_of(start: int) -> int:
    """How long a job that started then was in the queue."""
    return start % 4001


def _tres(choose: random.Random, gpus: int, nodes: int) -> tuple[str, str]:
    """AllocTRES, and the type of GPU that it names."""
    parts = [f"billing={8 * gpus + 4}", f"cpu={8 * gpus + 4}"]
    if gpus:
        typed, total = f"gres/gpu:a100={gpus}", f"gres/gpu={gpus}"
        parts += choose.choice(([typed, total], [typed, total], [typed], [total]))
    text = ",".join([*parts, f"mem={choose.choice((16, 64, 250, 500))}G", f"node={nodes}"])
    return text, "a100" if "a100" in text else "unknown"


def _line(row: dict[str, str], columns: Sequence[str]) -> str:
    return "|".join([row[name] for name in columns]) + "\n"


def _local(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment))


def _is_repeated_hour(moment: int) -> bool:
    """Whether the clock shows this time twice: then a record without its end does not tell which."""
    return _local(moment + 3600) == _local(moment) or _local(moment - 3600) == _local(moment)


def _days(start: int, end: int) -> Iterator[tuple[str, int]]:
    while start < end:
        now = time.localtime(start)
        midnight = int(time.mktime((now.tm_year, now.tm_mon, now.tm_mday + 1, 0, 0, 0, 0, 0, -1)))
        yield time.strftime("%Y-%m-%d", now), min(end, midnight) - start
        start = midnight
