"""One network namespace per node, all on one bridge, with names that resolve inside and outside.

Node r1n2 has address 10.77.0.2 on its interface eth0, whose other end is r1v2 on the bridge r1br0. The host
is r1ctl, 10.77.0.254. Nothing outside these names and the marked lines of /etc/hosts is touched.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.processes import ClusterError, call, until

BRIDGE = "r1br0"
INTERFACE = "eth0"  # inside every node: what GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name
CONTROLLER = "r1ctl"
CONTROLLER_ADDRESS = "10.77.0.254"
HOST_NETWORK = Path("/run/r1hpc-host-network")
"""In a box: the network of the host, for tests that fetch packages."""
_HOSTS = Path("/etc/hosts")
_NETNS_ETC = Path("/etc/netns")
_MARK = "# r1hpc test cluster"


def node_name(number: int) -> str:
    return f"r1n{number}"


def address(node: str) -> str:
    return f"10.77.0.{_number(node)}"


def make_network(nodes: Sequence[str]) -> None:
    """Bridge, namespaces, veth pairs, addresses and host names."""
    for node in nodes:
        call(["ip", "netns", "add", node])
    lines = [f"link add {BRIDGE} type bridge", f"addr add {CONTROLLER_ADDRESS}/24 dev {BRIDGE}"]
    lines += [f"link set {BRIDGE} up"]
    for node in nodes:
        veth = _veth(node)
        lines += [
            f"link add {veth} type veth peer name {INTERFACE} netns {node}",
            f"link set {veth} master {BRIDGE} up",
        ]
    call(["ip", "-batch", "-"], text="\n".join(lines) + "\n")
    for node in nodes:
        inside = f"link set lo up\naddr add {address(node)}/24 dev {INTERFACE}\nlink set {INTERFACE} up\n"
        call(["ip", "-n", node, "-batch", "-"], text=inside)
    _write_hosts(nodes)


def remove_network(nodes: Sequence[str]) -> None:
    """Kill what runs in the namespaces, then remove everything `make_network` made. Safe to repeat."""
    _strip_hosts()
    for node in nodes:
        if not (Path("/run/netns") / node).exists():
            continue
        kill_inside(node)
        call(["ip", "netns", "del", node])
    for node in nodes:
        shutil.rmtree(_NETNS_ETC / node, ignore_errors=True)
    with contextlib.suppress(OSError):  # not ours alone: leave it when others have entries
        _NETNS_ETC.rmdir()
    for link in [*map(_veth, nodes), BRIDGE]:
        # Deleting a namespace deletes its veth pair a moment later: losing that race is fine.
        with contextlib.suppress(ClusterError):
            call(["ip", "link", "del", link])


def inside(node: str, argv: Sequence[str]) -> list[str]:
    """`argv` for a process on that node. Each step replaces the last by exec, so the pid stays."""
    return ["ip", "netns", "exec", node, *_with_hostname(node, argv)]


def on_controller(argv: Sequence[str]) -> list[str]:
    """`argv` for a daemon of the controller host: the host's network, our own host name."""
    return _with_hostname(CONTROLLER, argv)


def with_index(argv: Sequence[str]) -> list[str]:
    """`argv` with the host's network, where package indexes are; also from a box."""
    return [*(["nsenter", f"--net={HOST_NETWORK}"] if HOST_NETWORK.exists() else []), *argv]


def pids_inside(node: str) -> list[int]:
    """Every process of a node: slurmd, step daemons, jobs."""
    return [int(word) for word in call(["ip", "netns", "pids", node]).split()]


def kill_inside(node: str) -> None:
    """SIGKILL everything on a node, as a power cut does."""

    def none_left() -> bool:
        pids = pids_inside(node)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    until(f"end of the processes of {node}", none_left, timeout=20)


def set_link(node: str, up: bool) -> None:
    """Plug or pull the node's cable."""
    call(["ip", "link", "set", _veth(node), "up" if up else "down"])


def _with_hostname(name: str, argv: Sequence[str]) -> list[str]:
    return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *argv]


def _number(node: str) -> str:
    return node.removeprefix("r1n")


def _veth(node: str) -> str:
    return f"r1v{_number(node)}"


def _write_hosts(nodes: Sequence[str]) -> None:
    entries = [f"{address(node)} {node}" for node in nodes] + [f"{CONTROLLER_ADDRESS} {CONTROLLER}"]
    _strip_hosts()
    before = _HOSTS.read_text()
    if before and not before.endswith("\n"):
        before += "\n"
    text = before + "".join(f"{entry} {_MARK}\n" for entry in entries)
    # In place, not by rename: in a container /etc/hosts is a mount point.
    _HOSTS.write_text(text)
    for node in nodes:
        (_NETNS_ETC / node).mkdir(parents=True, exist_ok=True)
        (_NETNS_ETC / node / "hosts").write_text(text)


def _strip_hosts() -> None:
    lines = _HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _MARK not in line]
    if kept != lines:
        _HOSTS.write_text("".join(kept))
