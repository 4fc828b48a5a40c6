"""Check the nodes of an allocation for `doctor --nodes`, each by itself, then against one another.

srun starts one task on each node (`node_part`), which collects by node.py and network.py. The judges of what
nodes see of one another are here.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.cluster import ClusterConfig
from r1hpc.preflight.findings import CheckState, SiteFinding, fail, ok, unknown, warn
from r1hpc.preflight.network import PeerFacts, collect_peers
from r1hpc.preflight.node import NodeFacts, collect_node, judge_node
from r1hpc.preflight.versions import VersionFacts
from r1hpc.slurm.client import SlurmError, call
from r1hpc.slurm.rank_env import choose_port, expand_nodelist
from r1hpc.slurm.script import interpreter, site_lines

_MARK = "r1hpc-doctor "
_PIECE = 400
"""Characters; a quoted one takes two."""
_TIMEOUT_S = 180.0
_SKEW_WARN_S = 1.0
_SKEW_FAIL_S = 30.0


@dataclass(frozen=True)
class Answers:
    """The reports that came back, srun's errors, and the files that nodes left in the run root."""

    nodes: tuple[NodeFacts, ...]
    complaint: str = ""
    files: tuple[str, ...] = ()
    is_locked: bool = True
    """The caller held the lock that the nodes tried to take."""


def ask_nodes(num_nodes: int, root: Path, cluster: ClusterConfig) -> Answers:
    """Run `node_part` on nodes of this allocation; raise UsageError if there is none, or it is smaller."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError(
            f"--nodes looks at the nodes of an allocation, and this is none: "
            f"salloc --nodes={num_nodes} --time=10 python -m r1hpc.doctor --nodes {num_nodes}"
        )
    has = int(os.environ.get("SLURM_JOB_NUM_NODES") or num_nodes)
    if num_nodes > has:
        raise UsageError(f"--nodes {num_nodes}: job {os.environ['SLURM_JOB_ID']} has {has}")
    with _shared_folder(root) as (shared, is_locked):
        asked = {"interface": cluster.network_interface, "ports": _free_ports(), "shared": str(shared)}
        step = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--overlap"]
        words = [*interpreter(cluster), "-m", "r1hpc.doctor", "--node-part", json.dumps(asked)]
        # After the lines of the profile, as in a job script. Not as "$@", which a line such as
        # `source setvars.sh` would read.
        program = f"{site_lines(cluster.setup, cluster.environment)}exec {shlex.join(words)}"
        try:
            said = call([*step, "--kill-on-bad-exit=0", "bash", "-c", program], _TIMEOUT_S)
            complaint = ""
        except SlurmError as error:
            said, complaint = error.stdout, error.stderr.strip() or str(error)
        files = tuple(sorted(path.name.removeprefix("node-") for path in shared.glob("node-*")))
    return Answers(tuple(read_reports(said)), complaint, files, is_locked)


def node_part(asked: str) -> str:
    """Return the output of one task: its report as JSON, in marked lines. srun mixes the lines of all tasks,
    and splits one of more than 1,024 bytes, with others' in between (SLURM_IO_MAX_MSG_LEN)."""
    order, environ = json.loads(asked), os.environ
    names = expand_nodelist(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    shared = Path(order["shared"]) if order["shared"] else None
    peers = collect_peers(int(environ["SLURM_NODEID"]), names, order["ports"], shared)
    facts = replace(collect_node(order["interface"]), peers=peers)
    return "\n".join(pieces_of(int(environ["SLURM_NODEID"]), json.dumps(asdict(facts))))


def pieces_of(node: int, text: str) -> Iterator[str]:
    """Yield marked lines, each within one of srun's messages."""
    starts = range(0, len(text), _PIECE)
    for number, start in enumerate(starts):
        yield _MARK + json.dumps([node, number, len(starts), text[start : start + _PIECE]])


def read_reports(text: str) -> Iterator[NodeFacts]:
    """Yield the reports among everything else that the nodes' start-up files print."""
    for said in map(json.loads, texts_of(text)):
        parts = {"versions": VersionFacts(**said["versions"]), "peers": PeerFacts(**said["peers"])}
        yield NodeFacts(**{**said, **parts})


def texts_of(text: str) -> Iterator[str]:
    """Yield the texts that `pieces_of` split; none if a piece is missing, as from a silent node."""
    pieces: dict[tuple[int, int], dict[int, str]] = {}
    for line in text.splitlines():
        _, mark, value = line.partition(_MARK)
        if mark:
            with contextlib.suppress(ValueError, TypeError):  # a line that another one cut
                node, number, count, piece = json.loads(value)
                pieces.setdefault((int(node), int(count)), {})[int(number)] = str(piece)
    for (_, count), found in sorted(pieces.items()):
        if len(found) == count:
            yield "".join(found[number] for number in range(count))


def judge_nodes(
    answers: Answers, num_nodes: int, expected_gpus: int | None, image: str | None = None
) -> list[SiteFinding]:
    """Judge every node by itself, merged where they agree, and the nodes against one another. `image` is the
    container of the ranks, if any."""
    nodes = answers.nodes
    each = {node.name: judge_node(node, expected_gpus, image) for node in nodes}
    names = [node.name for node in nodes]
    ran = ok("nodes", f"{', '.join(names)} ran the check")
    if len(names) < num_nodes:
        said = " | ".join(answers.complaint.splitlines()[:3]) or "they printed nothing"
        fix = "name a python that all nodes have (profile key `python`), and what it needs in `setup`"
        ran = fail("nodes", f"{len(names)} of {num_nodes} nodes ran the check: {said}", fix)
    found = [ran, *_merged(each)]
    if not nodes:
        return found
    return [*found, _judge_sameness(nodes, image), *_judge_files(answers), *_judge_network(nodes)]


def _judge_sameness(nodes: Sequence[NodeFacts], image: str | None) -> SiteFinding:
    environment: dict[str, Callable[[NodeFacts], object]] = {
        "python": lambda node: (node.versions.executable, node.versions.python),
        "packages": lambda node: sorted(node.versions.packages.items()),
    }
    aspects: dict[str, Callable[[NodeFacts], object]] = {
        **({} if image else environment),
        "driver": lambda node: node.driver,
        "GPUs": lambda node: [gpu["name"] for gpu in node.gpus],
    }
    differing = []
    for what, of in aspects.items():
        kinds: dict[str, list[str]] = {}
        for node in nodes:
            kinds.setdefault(str(of(node)), []).append(node.name)
        if len(kinds) > 1:
            odd = min(kinds.values(), key=len)
            differing.append(f"{what} of {', '.join(odd)} differ from the other nodes'")
    if differing:
        fix = "use one environment on the shared file system, and exclude odd nodes (--exclude)"
        return fail("sameness", "; ".join(differing), fix)
    return ok("sameness", f"{', '.join(aspects)} are the same on every node")


def _judge_files(answers: Answers) -> list[SiteFinding]:
    nodes = answers.nodes
    blind = [node.name for node in nodes if node.peers.sees_file is False]
    unseen = [node.name for node in nodes if node.name not in answers.files and node.name not in blind]
    fix = "put runs on a file system that all nodes mount: --run-root DIR, or R1HPC_RUN_ROOT"
    found = []
    if blind:
        detail = f"{', '.join(blind)} cannot see a file made by this machine"
        found.append(fail("shared run root", detail, fix))
    if unseen:
        found.append(fail("shared run root", f"files made by {', '.join(unseen)} are not seen here", fix))
    loose = [node.name for node in nodes if node.peers.lock_respected is False and answers.is_locked]
    if loose:
        mend = "mount it with locks for the whole cluster (Lustre: flock, not localflock)"
        found.append(warn("locks between nodes", f"{', '.join(loose)} took a lock that is held here", mend))
    tried = answers.is_locked and all(node.peers.lock_respected is not None for node in nodes)
    seen = "files and locks" if tried else "files"
    return found or [ok("shared run root", f"{seen} are seen from every node")]


def _judge_network(nodes: Sequence[NodeFacts]) -> list[SiteFinding]:
    if len(nodes) < 2:
        return []
    lost = [(node.name, node.peers.unreachable) for node in nodes if node.peers.unreachable]
    found = []
    if lost:
        fix = "ask whether a firewall lies between the nodes, and whether their names resolve on them"
        found.append(fail("nodes reach one another", "; ".join(f"{n}: {why}" for n, why in lost), fix))
    else:
        routes = sorted({node.peers.interface or "?" for node in nodes})
        found.append(ok("nodes reach one another", f"by {', '.join(routes)}"))
    loops = [node.name for node in nodes if "lo" in node.named_interfaces.values()]
    if loops:
        fix = "name the interface that leads to the other nodes, or none"
        found.append(fail("network interface", f"lo is named, but reaches no other node: {loops[0]}", fix))
    return [*found, *_judge_clocks({node.name: node.peers for node in nodes})]


def _judge_clocks(peers: Mapping[str, PeerFacts]) -> list[SiteFinding]:
    """Judge clocks against the first node's. An offset within the round trip is unknown, so not judged."""
    offsets = {
        name: max(0.0, abs(peer.clock_offset_s) - (peer.round_trip_s or 0.0) / 2)
        for name, peer in peers.items()
        if peer.clock_offset_s is not None
    }
    if not offsets:
        return [unknown("clocks", "no node could ask another for the time")]
    odd = {name: offset for name, offset in offsets.items() if offset > _SKEW_WARN_S}
    if not odd:
        return [ok("clocks", f"within {max(offsets.values()):.3f} s of one another")]
    detail = ", ".join(f"{name} is {offset:.1f} s from the first node" for name, offset in odd.items())
    judge = fail if max(odd.values()) > _SKEW_FAIL_S else warn
    return [judge("clocks", detail, "ask the administrators for NTP there (chronyc tracking)")]


def _merged(by_node: Mapping[str, Sequence[SiteFinding]]) -> list[SiteFinding]:
    """Merge findings on which the nodes agree; add node names to the others."""
    who: dict[SiteFinding, list[str]] = {}
    details: dict[str, str] = {}
    for name, findings in by_node.items():
        for finding in findings:
            key = finding
            if finding.state is CheckState.ok:
                key = ok(finding.check, "")
                details[finding.check] = finding.detail
            who.setdefault(key, []).append(name)
    return [
        SiteFinding(f.check, f.state, f"{', '.join(names)}: {f.detail or details[f.check]}", f.fix)
        for f, names in who.items()
    ]


@contextlib.contextmanager
def _shared_folder(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a folder under the run root with a file, and whether the file is locked while the nodes look. A
    file system without locks has its own finding (`file locks`); the other checks still run."""
    folder = root.absolute() / f".doctor-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700, parents=True)
    try:
        with (folder / "held").open("w") as held:
            is_locked = False
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
                is_locked = True
            yield folder, is_locked
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> list[int]:
    """Return several ports free here, and probably on the first node too."""
    listeners = [choose_port() for _ in range(4)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
