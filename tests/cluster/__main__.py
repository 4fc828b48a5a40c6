"""The test cluster from the command line, as root on Debian.

python -m tests.cluster up [--nodes 4]       start it and leave it running
python -m tests.cluster run srun -N4 hostname
eval "$(python -m tests.cluster env)"        then use sbatch, squeue, ... directly
python -m tests.cluster status
python -m tests.cluster preempt JOB          evict a scavenger job
python -m tests.cluster fail r1n2 [--how crash|cut|slurmd]
python -m tests.cluster restore r1n2
python -m tests.cluster grace SECONDS        GraceTime of the scavenger QOS
python -m tests.cluster down
python -m tests.cluster box pytest …         where another cluster can live beside this one
python -m tests.cluster worker ARGUMENTS     a Python for pytest-xdist, in a box if this machine can hold one
"""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from r1hpc.base.cli import ArgumentParser, run_command
from tests.cluster import packages
from tests.cluster.cluster import Cluster
from tests.cluster.network import HOST_NETWORK, INTERFACE
from tests.cluster.processes import ClusterError
from tests.cluster.state import STATE_FILE


def main(argv: Sequence[str]) -> int:
    """Do one command."""
    if argv[:1] == ["worker"]:  # its arguments are Python's
        _worker(argv[1:])
    parser = ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--send-user-signal", action="store_true")
    for name in ("down", "status", "env"):
        commands.add_parser(name)
    commands.add_parser("preempt").add_argument("job", type=int)
    commands.add_parser("grace").add_argument("seconds", type=int)
    fail = commands.add_parser("fail")
    fail.add_argument("node")
    fail.add_argument("--how", choices=("crash", "cut", "slurmd"), default="crash")
    commands.add_parser("restore").add_argument("node")
    for name in ("run", "box"):
        commands.add_parser(name).add_argument("words", nargs="...")
    args = parser.parse_args(argv)
    if args.command == "up":
        return _up(args.nodes, args.send_user_signal)
    if args.command == "box":
        _box(args.words)
    cluster = Cluster.attach() if args.command != "down" else None
    return _down() if cluster is None else _use(cluster, args)


def _up(num_nodes: int, send_user_signal: bool) -> int:
    cluster = Cluster(num_nodes, detached=True, send_user_signal=send_user_signal)
    seconds = cluster.start()
    print(f"{num_nodes} nodes up in {seconds:.1f} s: {' '.join(cluster.node_names)}")
    print(f"logs: {cluster.directory}/log   interface inside the nodes: {INTERFACE}")
    print(f"export SLURM_CONF={cluster.slurm_conf}")
    print(f"export R1HPC_TEST_CLUSTER={STATE_FILE}")
    return 0


_MOUNTS = f"""
set -e
mkdir -p /etc/netns
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/netns
touch {HOST_NETWORK}
mount --bind /proc/self/ns/net {HOST_NETWORK}
exec unshare --net bash -c "$0" box "$@"
"""
_BOX = """
set -e
grep -v 'r1hpc test cluster' /etc/hosts > /run/hosts || true
mount --bind /run/hosts /etc/hosts
ip link set lo up
export R1HPC_TEST_BOX=1 TMPDIR=$(mktemp -d --tmpdir r1hpc-box-XXXXXX) # MariaDB names files by its pid
chmod 1777 "$TMPDIR" # as /tmp is
status=0
"$@" || status=$? # no exec: a shell reaps the orphans
rm -rf "$TMPDIR"
exit $status
"""


def _box(words: Sequence[str]) -> NoReturn:
    """Run a command with its own network, processes, /run, /etc/hosts and temporary folder."""
    os.execvp("unshare", _boxed(*words))


def _boxed(*words: str) -> list[str]:
    own = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return ["unshare", *own, "bash", "-c", _MOUNTS, _BOX, *words]


def _worker(words: Sequence[str]) -> NoReturn:
    """Run Python, in a box if there can be a cluster: each worker of pytest has its own."""
    command = [sys.executable, *words]
    if packages.unavailable() is None and "R1HPC_TEST_CLUSTER" not in os.environ:
        with contextlib.suppress(ClusterError):  # pytest tries again, and reports it
            packages.install()
        if subprocess.run(_boxed("true"), capture_output=True).returncode == 0:  # some containers forbid it
            _box(command)
    os.execv(command[0], command)


def _down() -> int:
    print("stopped" if Cluster.stop_recorded() else "nothing runs")
    return 0


def _use(cluster: Cluster, args: object) -> int:
    words = vars(args)
    command = words["command"]
    if command == "run":
        os.execvpe(words["words"][0], words["words"], cluster.env())
    if command == "env":
        print(f"export SLURM_CONF={shlex.quote(str(cluster.slurm_conf))}")
        print(f"export R1HPC_TEST_CLUSTER={STATE_FILE}")
    elif command == "status":
        print(cluster.run(["sinfo", "-N", "-o", "%10N %10P %12T %.4c %G %E"]).stdout, end="")
        print(cluster.run(["squeue"]).stdout, end="")
        print(f"logs: {cluster.directory}/log")
    elif command == "preempt":
        print(cluster.preempt(words["job"]))
    elif command == "grace":
        cluster.set_grace(words["seconds"])
    elif command == "fail":
        cluster.fail_node(words["node"], words["how"])
    else:
        print(f"idle after {cluster.restore_node(words['node']):.1f} s")
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
