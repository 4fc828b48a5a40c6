"""Check one node: its packages, GPUs, shared memory and network interfaces."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.units import GIB, format_bytes
from r1hpc.preflight.findings import SiteFinding, fail, ok, unknown, warn
from r1hpc.preflight.network import PeerFacts
from r1hpc.preflight.versions import VersionFacts, collect_versions, judge_versions

_MIB = 2**20
_BUSY_BYTES = GIB
"""More than a driver uses itself on an idle GPU."""
_BUSY_PERCENT = 10
_HOT_C = 90
_SICK_SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
_OF_PROFILE = "cluster.network_interface"
_SHM_PER_RANK = 64 * _MIB
"""Docker's default for a container is too little for two ranks."""


@dataclass(frozen=True)
class NodeFacts:
    name: str
    versions: VersionFacts
    interfaces: tuple[str, ...] = ()
    named_interfaces: dict[str, str] = field(default_factory=dict)
    """Interfaces named by the profile or a variable, by its name."""
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    driver: str | None = None
    no_driver: str | None = None
    """Why NVML does not open."""
    gpus: Sequence[dict[str, Any]] = ()
    """Their readings (telemetry.gpu.nvml)."""
    gpu_notes: tuple[str, ...] = ()
    peers: PeerFacts = field(default_factory=PeerFacts)


def collect_node(asked_interface: str | None = None, versions: VersionFacts | None = None) -> NodeFacts:
    """Inspect this machine; `versions` are those of the interpreter of jobs, if it is not this one."""
    environ = os.environ
    names = {_OF_PROFILE: asked_interface}
    names |= {name: environ.get(name) for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    total = free = None
    with suppress(OSError):
        space = os.statvfs("/dev/shm")
        total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    return NodeFacts(
        name=environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
        versions=versions or collect_versions(environ),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        named_interfaces={who: value for who, value in names.items() if value},
        shm_bytes=total,
        shm_free_bytes=free,
        **_collect_gpus(),
    )


def judge_node(
    facts: NodeFacts, expected_gpus: int | None, image: str | None = None, runs_jobs: bool = True
) -> list[SiteFinding]:
    """Return the findings about a node by itself.

    Args:
        expected_gpus: GPUs a job must find there; None: nothing is expected, as on a login node.
        image: the container of the ranks, if any.
        runs_jobs: False for a login node, which need not have the interface that a profile names.
    """
    num_gpus = len(facts.gpus) if facts.driver is not None else expected_gpus
    versions = judge_versions(facts.versions, facts.driver, num_gpus)
    if image:
        detail = f"ranks run in {image}, which this host cannot check"
        fix = "look inside it: pip check, and torch.version.cuda against the driver of the nodes"
        versions = [unknown(finding.check, detail, fix) for finding in versions]
    return [
        *versions,
        *_judge_interfaces(facts, runs_jobs),
        _judge_shm(facts, expected_gpus),
        *_judge_gpus(facts, expected_gpus),
    ]


def _judge_interfaces(facts: NodeFacts, runs_jobs: bool) -> list[SiteFinding]:
    """Check interfaces. NCCL takes `name` as a prefix, `=name` exactly, `^name` as all but it, or a list."""
    found = []
    for who, value in facts.named_interfaces.items():
        if value.startswith("^"):
            continue
        names = [name.split(":")[0] for name in value.removeprefix("=").split(",")]
        exact = value.startswith("=") or not who.startswith("NCCL_")
        there = any(
            n == name or (not exact and n.startswith(name)) for n in facts.interfaces for name in names
        )
        if not there and who == _OF_PROFILE and not runs_jobs:
            fix = "look on the nodes with --nodes, inside an allocation"
            found.append(unknown("network interface", f"this machine has no {value}, which {who} names", fix))
        elif not there:
            has = ", ".join(facts.interfaces)
            fix = (
                f"set it to one of those, or leave {who} out: a run then takes the interface to rank 0's node"
            )
            found.append(fail("network interface", f"{who} names {value}; this node has {has}", fix))
    if not found and facts.named_interfaces:
        named = ", ".join(f"{who}={value}" for who, value in facts.named_interfaces.items())
        found.append(ok("network interface", f"{named} is there"))
    return found


def _judge_shm(facts: NodeFacts, expected_gpus: int | None) -> SiteFinding:
    needed = _SHM_PER_RANK * max(2, expected_gpus or 0)
    if facts.shm_bytes is None:
        fix = "mount a tmpfs there: NCCL and data loaders share memory by it"
        return fail("/dev/shm", "there is none", fix)
    detail = f"{format_bytes(facts.shm_free_bytes or 0)} free of {format_bytes(facts.shm_bytes)}"
    if facts.shm_bytes < needed:
        return fail("/dev/shm", detail, f"give the container at least {format_bytes(needed)} (--shm-size)")
    if (facts.shm_free_bytes or 0) < needed:
        return warn("/dev/shm", detail, "remove what dead jobs of yours have left there (ls -l /dev/shm)")
    return ok("/dev/shm", detail)


def _judge_gpus(facts: NodeFacts, expected: int | None) -> list[SiteFinding]:
    if facts.driver is None:
        if expected:
            fix = "ask for GPUs (--gres=gpu:N), or report the node to the administrators"
            return [fail("GPUs", f"{expected} expected: {facts.no_driver}", fix)]
        return [unknown("GPUs", facts.no_driver or "not looked at")]
    sick = [_faults_of(gpu) for gpu in facts.gpus]
    busy = [_use_of(gpu) for gpu in facts.gpus]
    found = []
    if any(sick) or facts.gpu_notes:
        words = "; ".join(filter(None, [*sick, *facts.gpu_notes]))
        fix = "exclude the node (--exclude NODE) and report it to the administrators"
        found.append(fail("GPU health", words, fix))
    if any(busy):
        judge = fail if expected else warn
        fix = "end what is left of your own jobs there (nvidia-smi), or exclude the node (--exclude NODE)"
        found.append(judge("GPUs busy", "; ".join(filter(None, busy)), fix))
    if expected is not None and len(facts.gpus) < expected:
        fix = "ask for that many (--gpus-per-node), and look at CUDA_VISIBLE_DEVICES"
        found.append(fail("GPUs", f"{len(facts.gpus)} are seen, {expected} expected", fix))
    links = {gpu["nvlink_links_active"] for gpu in facts.gpus} - {None}
    if len(links) > 1:
        fix = "exclude the node (--exclude NODE) and report it: its collectives run at the slowest link"
        found.append(warn("NVLink", f"GPUs of one node have {sorted(links)} active links", fix))
    names = sorted({gpu["name"] or "?" for gpu in facts.gpus})
    return found or [
        ok("GPUs", f"{len(facts.gpus)} x {', '.join(names)}, driver {facts.driver}, idle and well")
    ]


def _faults_of(gpu: dict[str, Any]) -> str | None:
    words = [gpu["error"]] if gpu.get("error") else []
    if errors := gpu["ecc_uncorrected_volatile"]:
        words.append(f"{errors} uncorrected memory errors since the driver was loaded")
    words += [f"slowed by {reason}" for reason in gpu["throttle_reasons"] or () if reason in _SICK_SLOWDOWNS]
    if (gpu["temperature_c"] or 0) >= _HOT_C:
        words.append(f"{gpu['temperature_c']} C")
    return f"GPU {gpu['index']}: {', '.join(words)}" if words else None


def _use_of(gpu: dict[str, Any]) -> str | None:
    words = [f"{len(gpu['processes'])} processes"] if gpu["processes"] else []
    if (gpu["memory_used_bytes"] or 0) > _BUSY_BYTES:
        words.append(f"{format_bytes(gpu['memory_used_bytes'])} taken")
    if (gpu["gpu_utilization_percent"] or 0) > _BUSY_PERCENT:
        words.append(f"{gpu['gpu_utilization_percent']} % busy")
    return f"GPU {gpu['index']}: {', '.join(words)}" if words else None


def _collect_gpus() -> dict[str, Any]:
    from r1hpc.telemetry.gpu.nvml import NoDriverError, open_nvml

    try:
        nvml = open_nvml()
    except NoDriverError as error:
        return {"no_driver": str(error).split(";")[0]}
    readings = [device.static() | device.sample(links=True) for device in nvml.devices]
    nvml.close()
    return {"driver": nvml.driver, "gpus": readings, "gpu_notes": tuple(nvml.notes)}
