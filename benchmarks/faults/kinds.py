"""The faults: what each does to a job or to the cluster, and which causes are true of it."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.faults.arms import Job
from tests.cluster import Cluster


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    title: str
    strike: Callable[[Cluster, Job], None]
    true: str = "no attempt should end"  # pattern of its true causes; any other is false
    user_signal: bool = False


def _preempt(cluster: Cluster, job: Job) -> None:
    cluster.preempt(job.number)


def _kill(_: Cluster, job: Job) -> None:
    os.kill(int((job.log / "pid").read_text()), signal.SIGKILL)


def _crash(cluster: Cluster, job: Job) -> None:
    (node,) = cluster.node_list(job.number)
    cluster.fail_node(node)
    time.sleep(45)
    cluster.restore_node(node, idle=False)


def _restart(cluster: Cluster, job: Job) -> None:
    if job.arm == "plain":  # once: it meets all jobs
        cluster.stop_controller()
        time.sleep(15)
        cluster.start_controller()


FAULTS = {
    "preemption": Fault("preemption, SIGTERM", _preempt, "preempted"),
    "signal": Fault("preemption, the job's own signal", _preempt, "preempted", user_signal=True),
    "kill": Fault("SIGKILL of the rank", _kill, "crash"),
    "node": Fault("node crash", _crash, "node_fail"),
    "controller": Fault("slurmctld away for 15 s", _restart),
}
