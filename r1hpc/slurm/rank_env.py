"""Read who a rank is from SLURM_* (or the local supervisor), fresh for each attempt.

MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE of the caller are never read: inherited from a shell
or from the job that submitted this one, they belong to another world.

The rest reads Slurm's node lists, and finds ports, addresses and network interfaces for the ranks.
"""

import fcntl
import ipaddress
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from r1hpc.base.errors import R1hpcError, StateError
from r1hpc.base.files import is_listed, read_json

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_LOWEST_PORT = 10_000
_PORT_TRIES = 200
_RENDEZVOUS_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RankContext:
    rank: int
    """0..world_size-1 over all nodes."""
    local_rank: int
    """0..local_world_size-1 on this node; also the index of its GPU."""
    world_size: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    node_name: str
    node_names: tuple[str, ...]
    """In Slurm's order: rank 0 is on the first."""
    attempt: int
    job_id: str | None = None
    master_host: str = "127.0.0.1"
    """The address of rank 0."""

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
            ("node_rank", self.node_rank, self.num_nodes),
        ):
            if not 0 <= value < limit:
                raise StateError(f"{name} {value} lies outside 0..{limit - 1}: was this started by srun?")
        if len(self.node_names) != self.num_nodes:
            raise StateError(f"{self.num_nodes} nodes, but these names: {', '.join(self.node_names)}")

    @property
    def peer_host(self) -> str:
        """Return another node to test the network: the first one, or for the first itself the second."""
        if self.num_nodes > 1 and self.node_rank == 0 and self.master_host != "127.0.0.1":
            return self.node_names[1]
        return self.master_host


def current(environ: Mapping[str, str]) -> RankContext:
    """Return the context of this process, under either executor. Raise StateError if neither srun nor the
    local supervisor started it, or a variable is missing or wrong."""
    if "R1HPC_LOCAL_RANK" in environ:
        return from_local(environ)
    if "SLURM_PROCID" in environ:
        return from_slurm(environ)
    raise StateError(
        "this is not a rank: SLURM_PROCID is not set. Start a run with `python -m r1hpc.submit`, "
        "or `sbatch sbatch/train.sh`"
    )


def from_slurm(environ: Mapping[str, str]) -> RankContext:
    """Return the context of a task that srun started (srun(1), "OUTPUT ENVIRONMENT VARIABLES"). The step's
    own variables are preferred to the job's: a job may hold more nodes than the step uses."""
    names = expand_nodelist(_first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    tasks = expand_counts(_first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    node_rank = _number(environ, "SLURM_NODEID")
    if not 0 <= node_rank < min(len(names), len(tasks)):
        raise StateError(f"SLURM_NODEID={node_rank}, but the step has {len(names)} nodes")
    return RankContext(
        rank=_number(environ, "SLURM_PROCID"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        num_nodes=len(names),
        node_name=environ.get("SLURMD_NODENAME", names[node_rank]),
        node_names=names,
        attempt=_number(environ, "R1HPC_ATTEMPT"),
        job_id=job_id(environ),
        master_host=names[0],
    )


def from_local(environ: Mapping[str, str]) -> RankContext:
    """Return the context of a rank on this machine, whose supervisor may simulate several nodes.

    Reads R1HPC_LOCAL_RANK (over all simulated nodes), R1HPC_LOCAL_WORLD_SIZE, R1HPC_LOCAL_NODE_COUNT (default
    1), R1HPC_ATTEMPT and R1HPC_LOCAL_JOB_ID (optional).
    """
    rank, world_size = _number(environ, "R1HPC_LOCAL_RANK"), _number(environ, "R1HPC_LOCAL_WORLD_SIZE")
    num_nodes = _number(environ, "R1HPC_LOCAL_NODE_COUNT") if "R1HPC_LOCAL_NODE_COUNT" in environ else 1
    if num_nodes < 1 or world_size % num_nodes:
        raise StateError(f"R1HPC_LOCAL_NODE_COUNT={num_nodes} does not divide {world_size} ranks")
    per_node = world_size // num_nodes
    names = played_nodes(num_nodes)
    node_rank = min(rank // per_node, num_nodes - 1)
    return RankContext(
        rank=rank,
        local_rank=rank % per_node,
        world_size=world_size,
        local_world_size=per_node,
        node_rank=node_rank,
        num_nodes=num_nodes,
        node_name=names[node_rank],
        node_names=names,
        attempt=_number(environ, "R1HPC_ATTEMPT"),
        job_id=environ.get("R1HPC_LOCAL_JOB_ID"),
    )


def played_nodes(num_nodes: int) -> tuple[str, ...]:
    """Return the names of the nodes that this machine simulates for a local run."""
    host = socket.gethostname()
    return (host,) if num_nodes == 1 else tuple(f"{host}-{index}" for index in range(num_nodes))


def job_id(environ: Mapping[str, str]) -> str | None:
    """Return the id by which scontrol, scancel and sacct find this job alone. For an array task that is
    ARRAY_TASK: its plain SLURM_JOB_ID may be the full array's."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def expand_nodelist(text: str) -> tuple[str, ...]:
    """Return the names in Slurm's host list notation, in order; raise StateError for a bad bracket or range.

    >>> expand_nodelist("n[1-3,07],m2")
    ('n1', 'n2', 'n3', 'n07', 'm2')
    """
    if not re.fullmatch(r"([^\[\]]|\[[^\[\]]*\])*", text):
        raise StateError(f"cannot read the node list {text!r}: unbalanced brackets")
    names: list[str] = []
    for item in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text):  # a comma in brackets does not separate
        found = [""]
        # "a[1-2]b[3,4]c" splits into alternating text and bracket contents.
        for index, part in enumerate(re.split(r"\[([^\]]*)\]", item)):
            choices = _expand_ranges(part, item) if index % 2 else [part]
            found = [name + choice for name in found for choice in choices]
        names += found
    return tuple(names)


def expand_counts(text: str) -> tuple[int, ...]:
    """Return Slurm's repeated counts: "4(x2),3" is (4, 4, 3)."""
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not found:
            raise StateError(f"cannot read the task counts {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)


def choose_port() -> socket.socket:
    """Return a listening socket on a random free port that the kernel never gives to outgoing connections.

    It listens on all addresses. Any client can take a port of the ephemeral range between its choice and its
    use, which at scale happens daily. The caller keeps the socket (it *is* the reservation) or hands its
    descriptor on. Raise R1hpcError if no port is free.
    """
    ports = _outside_ephemeral()
    for _ in range(_PORT_TRIES):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # SystemRandom: ranks seed the global generator alike, and two jobs on a node must not collide.
            listener.bind(("", random.SystemRandom().choice(ports)))
            listener.listen(1024)
            return listener
        except OSError:
            listener.close()
    raise R1hpcError(
        f"no free port in {_PORT_TRIES} tries from {_LOWEST_PORT} up: what listens on this node? (ss -ltn)"
    )


class Meeting(TypedDict):
    """rendezvous.json: where rank 0 is found, and in which attempt."""

    host: str
    port: int
    token: str
    checkpoint: NotRequired[str]
    """Rank 0's choice for the ranks of a script; empty: none."""


def await_meeting(place: Path, token: str, beat: Callable[[str], None]) -> Meeting:
    """Return what rank 0 of this attempt wrote; call `beat` meanwhile. Raise R1hpcError after ten minutes."""
    deadline, pause_s = time.monotonic() + _RENDEZVOUS_TIMEOUT_S, 0.1
    while time.monotonic() < deadline:
        beat("waiting for rank 0")  # not a hang: the deadline ends it, with its own message
        if is_listed(place):
            meeting: Meeting = read_json(place, Meeting)
            if meeting["token"] == token:
                return meeting
        time.sleep(pause_s)
        pause_s = min(1.0, 1.2 * pause_s)  # a thousand ranks ask
    raise R1hpcError(
        f"rank 0 did not write {place} within {_RENDEZVOUS_TIMEOUT_S:.0f} s; see the log of rank 0"
    )


def own_address(environ: Mapping[str, str], name: str) -> str:
    """Return the address by which others reach this node, called `name`.

    The one on the route to the submitting host; if that is this node itself, the one of its name. A Debian
    node may know its own name as 127.0.1.1 only. Raise R1hpcError if every route leads to a loopback address.
    """
    for host in filter(None, (environ.get("SLURM_SUBMIT_HOST"), name, socket.getfqdn())):
        try:
            _, address = _source_address(host)
        except OSError:
            continue
        if not ipaddress.ip_address(address.split("%")[0]).is_loopback:
            return address
    raise R1hpcError(
        f"{name} finds no address of its own that other nodes reach: name one by serve.host=ADDRESS"
    )


def network_interface_to(host: str) -> str | None:
    """Return the interface by which this node reaches `host`, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.

    Sends no packet: connecting a UDP socket only reads the routing table. None if no interface has the source
    address (an alias of a primary address, some container networks). Raise R1hpcError if `host` does not
    resolve, or there is no route to it.
    """
    try:
        family, source = _source_address(host)
    except OSError as error:
        raise R1hpcError(
            f"this node cannot reach {host}: {error}; check that its name resolves here"
        ) from None
    find = _interface_of_ipv4 if family == socket.AF_INET else _interface_of_ipv6
    return find(source)


def _source_address(host: str) -> tuple[int, str]:
    """Return (family, address) that the routing table uses to send from this node to `host`."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return family, str(probe.getsockname()[0])


def _outside_ephemeral() -> list[int]:
    first, last = 32768, 60999  # the kernel's defaults, ip-sysctl.rst
    if _EPHEMERAL.exists():
        first, last = (int(text) for text in _EPHEMERAL.read_text().split())
    ports = [*range(_LOWEST_PORT, first), *range(max(last + 1, _LOWEST_PORT), 65536)]
    # A node may declare nearly all ports ephemeral; then none is safe and the reservation must do.
    return ports or list(range(_LOWEST_PORT, 65536))


def _interface_of_ipv4(address: str) -> str | None:
    wanted = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if answer[20:24] == wanted:  # struct ifreq: name[16], family, port, address
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.split("%")[0]).hex()
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        fields = line.split()
        if fields[0] == wanted:
            return fields[5]
    return None


def _expand_ranges(text: str, item: str) -> list[str]:
    values: list[str] = []
    for piece in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if not found:
            raise StateError(f"cannot read the range {piece!r} of the node list {item!r}")
        first, last = found[1], found[2] or found[1]
        values += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return values


def _first(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environ.get(name):
            return environ[name]
    raise StateError(f"{names[0]} is not set: this must run under srun")


def _number(environ: Mapping[str, str], *names: str) -> int:
    text = _first(environ, *names)
    if not text.isascii() or not text.isdigit():
        raise StateError(f"{names[0]}={text!r} is not a number")
    return int(text)
