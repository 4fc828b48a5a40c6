"""A real Slurm cluster on this host: controller, accounting database and up to eight nodes.

    with Cluster() as cluster:
        print(cluster.run(["srun", "-N4", "hostname"]).stdout)

Everything lives in one temporary folder, and what runs is written to STATE_FILE, so that a later start ends
what a killed one left. One cluster per host: munge's default socket and the bridge exist once.
`python -m tests.cluster box` has room for another one.
"""

import os
import secrets
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from string import Template
from typing import Self

from tests.cluster import network, packages
from tests.cluster.client import Client
from tests.cluster.network import CONTROLLER, CONTROLLER_ADDRESS
from tests.cluster.processes import (
    ClusterBusyError,
    ClusterError,
    alive,
    call,
    end,
    spawn,
    tail,
    this_process,
    until,
)
from tests.cluster.state import STATE_FILE, State, only_one, remove

_MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
_HERE = Path(__file__).parent
_DATABASE_PORT, _NODE_PORT, _DBD_PORT = 13306, 16818, 16819  # as in the two .conf.in
_USER_SIGNAL = "PreemptParameters=send_user_signal"
_OTHER = f"use it with R1HPC_TEST_CLUSTER={STATE_FILE}, or end it: python -m tests.cluster down"
GRACE_SECONDS = 10
"""In effect at least kill_wait + message_timeout; see Cluster."""


def in_use() -> str | None:
    """Whose cluster runs on this host, and what to do about it; None when none does."""
    state = State.load()
    if state is None or not state.running():
        return None
    whose = f"process {state.owner[0]}" if state.owner else "python -m tests.cluster up"
    return f"the cluster of {whose} runs already in {state.directory}: {_OTHER}"


class Cluster(Client):
    """Start, break, mend and stop the cluster; as a Client, use it.

    Args:
        num_nodes: r1n1 .. r1n<num_nodes>, each with 8 CPUs, 64 GB and 4 GPUs "a100" as far as Slurm knows.
        detached: keep it running after this process ends, until `stop`.
        send_user_signal: preemption sends the job's --signal instead of SIGTERM (PreemptParameters).
        kill_wait, message_timeout, slurmd_timeout: seconds, as in slurm.conf(5). slurmctld looks at the end
            of a victim's GraceTime only kill_wait + message_timeout seconds after it chose it, and then at
            each scheduler pass (2 s): a shorter grace is longer than it says (measured on 24.11.5, and
            select_nodes() of src/slurmctld/node_scheduler.c). Of KillWait job.sh leaves 15 s to the end of an
            attempt, which on a busy machine needs them.
    """

    def __init__(
        self,
        num_nodes: int = 4,
        *,
        directory: Path | None = None,
        detached: bool = False,
        send_user_signal: bool = False,
        kill_wait: int = 20,
        message_timeout: int = 5,
        slurmd_timeout: int = 15,
    ) -> None:
        self.directory = directory or Path(tempfile.gettempdir()) / f"r1hpc-cluster-{secrets.token_hex(4)}"
        super().__init__(self.directory / "slurm.conf")
        self.send_user_signal = send_user_signal
        self.kill_wait = kill_wait
        self.message_timeout = message_timeout
        self.slurmd_timeout = slurmd_timeout
        names = [network.node_name(number) for number in range(1, num_nodes + 1)]
        self.state_record = State(str(self.directory), names, None if detached else this_process())

    @classmethod
    def attach(cls, where: Path | None = None) -> Self:
        """The cluster that already runs on this host.

        Raises:
            ClusterError: none runs, or `where` (its folder or state file) is not the one that runs.
        """
        state = State.load()
        if state is None or not state.running():
            raise ClusterError("no cluster runs here; start one: python -m tests.cluster up")
        if where is not None and where.resolve() not in {STATE_FILE, Path(state.directory).resolve()}:
            raise ClusterError(f"{where} is not the running cluster, which is in {state.directory}")
        cluster = cls(directory=Path(state.directory))
        cluster.state_record = state
        return cluster

    @property
    def node_names(self) -> list[str]:
        return self.state_record.nodes

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # -- up and down ----------------------------------------------------------------------------------

    def start(self) -> float:
        """Bring everything up and return the seconds it took; on ClusterError nothing is left of it."""
        begin = time.monotonic()
        with only_one():
            left = State.load()
            if left and left.running():
                raise ClusterBusyError(str(in_use()))
            if left:
                remove(left)
            packages.install()
            try:
                self._bring_up()
            except BaseException:
                remove(self.state_record)
                raise
        return time.monotonic() - begin

    def stop(self) -> None:
        """End every process and remove every file and interface of the cluster. Safe to repeat."""
        with only_one():
            current = State.load()
            if current and current.directory == str(self.directory):
                remove(current)

    @staticmethod
    def stop_recorded() -> bool:
        """Stop whatever cluster this host has on record, running or left over; False when there is none."""
        with only_one():
            current = State.load()
            if current:
                remove(current)
        return current is not None

    def _bring_up(self) -> None:
        self.directory.mkdir(mode=0o755)
        for name in ("ctld", "db", "log", "gpus"):
            (self.directory / name).mkdir(mode=0o755)
        self.state_record.save()
        network.make_network(self.node_names)
        self._write_configuration()
        self._start_munge()
        self._start_database()
        self._start_accounting()
        self._start_daemon("slurmctld", network.on_controller(["slurmctld", "-D"]))
        for node in self.node_names:
            self._start_node(node)
        self._wait_controller()
        self.wait_nodes(self.node_names, timeout=30)

    def _start_daemon(self, name: str, argv: list[str]) -> Path:
        log = self._log(name)
        path = {"PATH": packages.PATH, "SLURM_CONF": str(self.slurm_conf), "HOME": "/root", "LANG": "C.UTF-8"}
        self.state_record.processes[name] = spawn(argv, log, path)
        self.state_record.save()
        return log

    def _log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def _wait_started(self, name: str, what: str, ready: Callable[[], bool], timeout: float) -> None:
        log = self._log(name)

        def ready_or_dead() -> bool:
            if not alive(self.state_record.processes[name]):
                raise ClusterError(f"{name} ended while it started\n{tail(log)}")
            return ready()

        until(what, ready_or_dead, timeout, log)

    def _start_munge(self) -> None:
        if _munge_answers():
            return  # the system's own munged serves us as well
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        _MUNGE_SOCKET.parent.mkdir(mode=0o755, exist_ok=True)
        files = [f"--{name}-file={self.directory / 'munge'}.{name}" for name in ("key", "pid", "log", "seed")]
        self._start_daemon("munged", ["munged", "--foreground", "--force", "--num-threads=4", *files])
        self._wait_started("munged", "munge answers", _munge_answers, 10)

    def _start_database(self) -> None:
        data = self.directory / "db"
        options = ["--no-defaults", "--user=root", f"--datadir={data}"]
        # Nothing here must outlive a crash of the host, so nothing is synced; this halves the start.
        fast = ["--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync", "--skip-name-resolve"]
        call(
            [
                "mariadb-install-db",
                *options,
                *fast[:2],
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ],
            timeout=90,
        )
        first = self.directory / "first.sql"
        first.touch(mode=0o600)
        first.write_text(
            "CREATE DATABASE slurm_acct_db;\n"
            f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{self._password}';\n"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
            f"ALTER USER 'root'@'localhost' IDENTIFIED BY '{self._password}';\n"
        )
        where = ["--bind-address=127.0.0.1", f"--port={_DATABASE_PORT}", f"--socket={data / 'socket'}"]
        where += [f"--pid-file={data / 'pid'}", f"--init-file={first}", "--innodb-buffer-pool-size=64M"]
        self._start_daemon("mariadbd", ["mariadbd", *options, *fast, *where])
        self._wait_started(
            "mariadbd", "the database listens", lambda: _listens("127.0.0.1", _DATABASE_PORT), 30
        )

    def _start_accounting(self) -> None:
        self._start_slurmdbd()
        for command in _ACCOUNTS:
            self._sacctmgr(*command.split())
        self.set_grace(GRACE_SECONDS)

    def _start_slurmdbd(self) -> None:
        """Start it until it stays up: its first connection to a fresh MariaDB often ends it (error 5027)."""
        deadline = time.monotonic() + 45

        def up_or_again() -> bool:
            process = self.state_record.processes.get("slurmdbd")
            if (process is None or not alive(process)) and time.monotonic() < deadline:
                self._start_daemon("slurmdbd", network.on_controller(["slurmdbd", "-D"]))
            return _listens(CONTROLLER_ADDRESS, _DBD_PORT)

        until("slurmdbd listens", up_or_again, 60, self._log("slurmdbd"))

    def _start_node(self, node: str) -> None:
        self._start_daemon(f"slurmd.{node}", network.inside(node, ["slurmd", "-D", "-N", node]))

    def _wait_controller(self) -> None:
        def answers() -> bool:
            return self.run(["scontrol", "ping"], check=False, timeout=20).returncode == 0

        self._wait_started("slurmctld", "slurmctld answers", answers, 40)

    def wait_nodes(self, nodes: list[str], timeout: float = 60) -> float:
        """Wait until these nodes are up and free of jobs; return the seconds it took."""

        def idle() -> bool:
            now = self.nodes()
            return all(now.get(node) == "idle" for node in nodes)

        return until(f"{' '.join(nodes)} idle", idle, timeout, self._log("slurmctld"))

    # -- configuration --------------------------------------------------------------------------------

    @property
    def _password(self) -> str:
        file = self.directory / "password"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(16))
        return file.read_text()

    def _write_configuration(self) -> None:
        gpus = self.directory / "gpus"
        for number in range(4):
            # Slurm wants character devices; these are the null device under other names (1:3).
            os.mknod(gpus / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (self.directory / "gres.conf").write_text(f"Name=gpu Type=a100 File={gpus}/gpu[0-3]\n")
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        dbd = self.directory / "slurmdbd.conf"
        dbd.touch(mode=0o600)
        dbd.write_text(self._filled("slurmdbd.conf.in", password=self._password))
        self._write_slurm_conf()

    def _write_slurm_conf(self) -> None:
        lines = [f"NodeName={node} NodeAddr={network.address(node)}" for node in self.node_names]
        text = self._filled(
            "slurm.conf.in",
            count=str(len(lines)),
            node_lines="\n".join(lines),
            controller_address=CONTROLLER_ADDRESS,
            preempt_parameters=_USER_SIGNAL if self.send_user_signal else "",
            kill_wait=str(self.kill_wait),
            message_timeout=str(self.message_timeout),
            slurmd_timeout=str(self.slurmd_timeout),
        )
        self.slurm_conf.write_text(text)

    def _filled(self, template: str, **values: str) -> str:
        text = Template((_HERE / template).read_text())
        return text.substitute(directory=str(self.directory), controller=CONTROLLER, **values)

    def _sacctmgr(self, *words: str) -> None:
        self.run(["sacctmgr", "--immediate", *words], timeout=30)

    def set_grace(self, seconds: int) -> None:
        """GraceTime of the scavenger QOS, at once."""
        self._sacctmgr("modify", "qos", "scavenger", "set", f"gracetime={seconds}")

    def set_user_signal(self, on: bool) -> None:
        """Switch PreemptParameters=send_user_signal; restarts the controller."""
        lines = self.slurm_conf.read_text().splitlines()
        kept = [line for line in lines if not line.startswith("PreemptParameters=")]
        self.slurm_conf.write_text("\n".join(kept + [_USER_SIGNAL] * on) + "\n")
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
            lambda: _listens(network.address(node), _NODE_PORT),
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


_ACCOUNTS = (
    "add cluster r1hpc",
    "add account research description=research organization=research",
    "add qos scavenger priority=0 preemptmode=requeue",
    "add qos urgent priority=1000 preempt=scavenger",
    "modify qos normal set priority=100",
    "add user root account=research qos=normal,scavenger,urgent defaultqos=normal",
    "modify user root set defaultaccount=research",
)


def _munge_answers() -> bool:
    if not _MUNGE_SOCKET.exists():
        return False
    try:
        call(["munge", "--no-input"], timeout=5)
    except ClusterError:
        return False
    return True


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
