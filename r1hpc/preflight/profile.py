"""Write a cluster profile: what `doctor --write-profile` found, or what a person answered to `init`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.config.assets import assets, own_profiles
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.yaml_files import write_yaml
from r1hpc.plan.topology.gpus import known_card, smaller_cards
from r1hpc.preflight.node import NodeFacts
from r1hpc.slurm.defaults import place_in_cluster
from r1hpc.slurm.probe import ClusterFacts


def profile_of(config: RunConfig, facts: ClusterFacts, nodes: Sequence[NodeFacts]) -> dict[str, Any]:
    """Return keys of config.schema.cluster.ClusterConfig. GPUs left out are probed at each submission.

    The interface is named only if all nodes use the same. GPUs are left out if none was seen: another
    partition may have some. Partition, QOS and account are those that the user named; defaults are left to
    Slurm, since a site may route jobs, and a QOS is an account's.
    """
    partition, qos, account = place_in_cluster(config)
    gpus_per_node = max((len(node.gpus) for node in nodes), default=0) or facts.gpus_per_node
    gpus = [gpu for node in nodes for gpu in node.gpus]
    routes = {node.peers.interface for node in nodes if node.peers.interface}
    found = {
        "name": config.cluster.name,
        "partition": partition,
        "account": account,
        "qos": qos,
        "gpus_per_node": gpus_per_node or None,
        "gpu_type": _gpu_type(gpus[0]["name"] if gpus else facts.gpu_type),
        "network_interface": routes.pop() if len(routes) == 1 else None,
        "python": config.cluster.python or sys.executable,
    }
    return {key: value for key, value in found.items() if value is not None}


def profile_name(path: Path) -> str:
    """Return how --cluster finds the file: by its name in the two folders of profiles, else by its path."""
    path = path.resolve()
    found = path.parent in (assets("configs") / "cluster", own_profiles().resolve())
    return path.stem if found and path.suffix == ".yaml" else shlex.quote(str(path))


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Write a profile; make its folder if there is none. Raise UsageError if the file exists, perhaps written
    by a person, or the path cannot be written."""
    if path.exists():
        raise UsageError(f"{path} exists: remove it, or name another file with --write-profile")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_yaml(path, profile)
    except OSError as error:
        raise UsageError(
            f"--write-profile {path}: {error.strerror}: name a file that you can write"
        ) from error


def _gpu_type(name: str | None) -> str | None:
    if name and smaller_cards(name):
        return name.lower()  # a submission then reports which GPU it assumes
    card = known_card(name)
    return card.name.lower() if card else None
