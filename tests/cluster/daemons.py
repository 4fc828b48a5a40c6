"""The daemons of a Slurm cluster on this host: controller, accounting database and up to eight nodes.

Everything lives in one temporary folder, and what runs is written to STATE_FILE, so that a later start ends
what a killed one left. One cluster per host: munge's default socket and the bridge exist once.
`python -m tests.cluster box` has room for another one.
"""

import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
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
    spawn,
    tail,
    this_process,
    until,
)
from tests.cluster.state import STATE_FILE, State, only_one, remove

_MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
_HERE = Path(__file__).parent
_DATABASE_PORT, NODE_PORT, _DBD_PORT = 13306, 16818, 16819  # as in the two .conf.in
USER_SIGNAL = "PreemptParameters=send_user_signal"
_OTHER = f"use it with R1HPC_TEST_CLUSTER={STATE_FILE}, or end it: python -m tests.cluster down"
GRACE_SECONDS = 10
"""In effect at least kill_wait + message_timeout; see Daemons."""


def in_use() -> str | None:
    """Whose cluster runs on this host, and what to do about it; None when none does."""
    state = State.load()
    if state is None or not state.running():
        return None
    whose = f"process {state.owner[0]}" if state.owner else "python -m tests.cluster up"
    return f"the cluster of {whose} runs already in {state.directory}: {_OTHER}"


class Daemons(Client):
    """Start and stop the cluster; as a Client, use it.

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
            "mariadbd", "the database listens", lambda: listens("127.0.0.1", _DATABASE_PORT), 30
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
            return listens(CONTROLLER_ADDRESS, _DBD_PORT)

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
            preempt_parameters=USER_SIGNAL if self.send_user_signal else "",
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


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
