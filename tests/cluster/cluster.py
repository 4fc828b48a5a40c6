"""A real Slurm cluster on this host, to use, break and mend.

with Cluster() as cluster:
    print(cluster.run(["srun", "-N4", "hostname"]).stdout)
"""

import signal
import time
import warnings
from collections.abc import Collection
from functools import partial

from tests.cluster import network
from tests.cluster.daemons import NODE_PORT, USER_SIGNAL, Daemons, listens
from tests.cluster.processes import ClusterError, alive, end, tail, until


class Cluster(Daemons):
    """The cluster, and what can befall it."""

    def set_user_signal(self, on: bool) -> None:
        """Switch PreemptParameters=send_user_signal; restarts the controller."""
        lines = self.slurm_conf.read_text().splitlines()
        kept = [line for line in lines if not line.startswith("PreemptParameters=")]
        self.slurm_conf.write_text("\n".join(kept + [USER_SIGNAL] * on) + "\n")
        self.restart_controller()

    def set_waits(self, kill_wait: int, message_timeout: int) -> None:
        """Change KillWait and MessageTimeout; restarts every daemon of a cluster without jobs.

        slurmd answers the end of a step once KillWait is over. Where that is later than MessageTimeout,
        slurmctld asks again, and a job that was requeued meanwhile gets the SIGTERM in its new step 0. With
        the usual credentials of 120 s no job is started again so soon.
        """
        self.kill_wait, self.message_timeout = kill_wait, message_timeout
        self._write_slurm_conf()
        for node in self.node_names:
            end(self.state_record.processes[f"slurmd.{node}"])
            self._start_node(node)
        self.restart_controller()

    # -- breaking and mending -------------------------------------------------------------------------

    def fail_node(self, node: str, how: str = "crash", declare: bool = False) -> None:
        """Take a node away.

        Args:
            how: "crash" cuts the link and kills every process of the node; "cut" only cuts the link, so
                its jobs run on unseen; "slurmd" only kills slurmd, so its jobs run on with the network.
            declare: tell the controller at once, as an administrator would, instead of letting it find out
                after SlurmdTimeout.
        """
        if how not in {"crash", "cut", "slurmd"}:
            raise ClusterError(f"fail_node: how is 'crash', 'cut' or 'slurmd', not {how!r}")
        if how in {"crash", "cut"}:
            network.set_link(node, up=False)
        if how == "crash":
            network.kill_inside(node)
        if how == "slurmd":
            end(self.state_record.processes[f"slurmd.{node}"])
        if declare:
            self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])

    def restore_node(self, node: str, timeout: float = 60, *, idle: bool = True) -> float:
        """Bring a failed node back, free of old jobs, and wait until it is idle; return the seconds.

        Args:
            idle: off where a job that waits for the node may have it at once.
        """
        begin = time.monotonic()
        network.set_link(node, up=True)
        process = self.state_record.processes[f"slurmd.{node}"]
        if not alive(process):
            network.kill_inside(node)  # tasks that outlived their slurmd
            self._start_node(node)
        until(
            f"{node} answers",
            lambda: listens(network.address(node), NODE_PORT),
            20,
            self._log(f"slurmd.{node}"),
        )
        # Refused when it is up already; ReturnToService does it as well, but only at the next registration.
        self.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
        if idle:
            self.wait_nodes([node], timeout)
        return time.monotonic() - begin

    def stop_controller(self) -> None:
        """End slurmctld as an administrator does; running jobs go on."""
        end(self.state_record.processes["slurmctld"], signal.SIGTERM, patience=30)

    def kill_controller(self) -> None:
        """End slurmctld as a crash does: it loses what it has not saved in its last seconds; jobs go on."""
        end(self.state_record.processes["slurmctld"], signal.SIGKILL)

    def wait_saved(self, jobs: Collection[int], timeout: float = 60) -> None:
        """Wait until slurmctld has written down that these jobs run; after a crash before that they pend.

        It writes its state some seconds after a change, many on a busy machine.
        """
        for job in jobs:
            self.wait_job(job, {"RUNNING"})
            self.run(["scontrol", "update", f"jobid={job}", f"admincomment=seen-running-{job}."])
        saved = self.directory / "ctld" / "job_state"
        marks = [f"seen-running-{job}.".encode() for job in jobs]
        until(
            "the saved state of running jobs",
            lambda: saved.exists() and all(mark in saved.read_bytes() for mark in marks),
            timeout,
        )

    def start_controller(self) -> None:
        """Start slurmctld from its saved state."""
        self._start_daemon("slurmctld", network.on_controller(["slurmctld", "-D"]))
        self._wait_controller()

    def restart_controller(self) -> None:
        """As an administrator does, and wait until the nodes have registered.

        A job that starts before is taken for lost when a node that has not heard of it yet registers.
        """
        self.stop_controller()
        self.start_controller()
        until("registration of the nodes", lambda: "unknown" not in self.nodes().values(), 60)

    def clear(self, timeout: float = 90) -> None:
        self.revive()
        super().clear(timeout)

    def revive(self) -> None:
        """Start again the daemons that ended behind a test's back, and warn with the last lines of each log.

        Otherwise one controller that crashed fails every test after it, and nobody sees which one began it.
        """
        starts = {"slurmctld": self.start_controller}
        starts |= {f"slurmd.{node}": partial(self._start_node, node) for node in self.node_names}
        for name, start in starts.items():
            if not alive(self.state_record.processes[name]):
                warnings.warn(f"{name} had ended\n{tail(self._log(name))}", stacklevel=2)
                start()

    def stop_accounting(self) -> None:
        """End slurmdbd: sacct and sacctmgr fail, jobs go on."""
        end(self.state_record.processes["slurmdbd"], signal.SIGTERM)

    def start_accounting(self) -> None:
        """Start slurmdbd again; the controller, which kept its records, sends them some seconds later."""
        self._start_slurmdbd()
