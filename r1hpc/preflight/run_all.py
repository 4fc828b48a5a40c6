"""Run every check of `doctor`, in order: Slurm, the run root, the job, this machine or the nodes."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import Facts, workload_of
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import load
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.run import RunConfig
from r1hpc.preflight.findings import SiteFinding, fail, ok, warn
from r1hpc.preflight.node import collect_node, judge_node
from r1hpc.preflight.nodes import Answers, ask_nodes, judge_nodes
from r1hpc.preflight.profile import profile_of
from r1hpc.preflight.slurm_settings import judge_cluster
from r1hpc.preflight.storage import collect_storage, judge_storage
from r1hpc.preflight.versions import ask_versions
from r1hpc.slurm import fields
from r1hpc.slurm.defaults import decide, place_in_cluster, slurm_is_here
from r1hpc.slurm.flags import overrides_from_environment
from r1hpc.slurm.probe import ClusterFacts, probe_cluster


@dataclass(frozen=True)
class Examination:
    """The findings, and a profile of what was found."""

    findings: tuple[SiteFinding, ...]
    profile: dict[str, Any]


def examine(
    job: str | None, root: Path, num_nodes: int | None, cluster: str | None, partition: str | None = None
) -> Examination:
    """Check this machine, or `num_nodes` nodes of the current allocation.

    Args:
        partition: replaces that of SBATCH_PARTITION, the job, the profile or Slurm's default.

    Raises:
        ConfigError: the job or the profile cannot be read.
        UsageError: `num_nodes` outside an allocation, or more than it has; an invalid SBATCH_* variable or
            profile.
    """
    config = load(job, overrides_from_environment(os.environ), cluster)
    fields.check_cluster(config.cluster)
    if partition is not None:
        config = replace(config, resources=replace(config.resources, partition=partition))
    here = slurm_is_here()
    facts, refused = _ask_slurm(config) if here else (ClusterFacts(), [])
    found = [*refused, *([] if refused else judge_cluster(facts, here))]
    found += _judge_script(config, root)
    needed, about_job = _needs(config, facts, here) if job is not None else (None, [])
    storage = collect_storage(root)
    found += [*judge_storage(storage, needed), *about_job]
    image, answers = config.cluster.container.image, Answers(())
    if num_nodes is None or storage.error is not None:
        # Do not test SLURM_JOB_ID: `salloc` starts its command on the login node.
        is_node = bool(os.environ.get("SLURMD_NODENAME"))
        python = None if image else config.cluster.python
        versions = ask_versions(python, setup=bool(config.cluster.setup)) if python else None
        facts_here = collect_node(config.cluster.network_interface, versions)
        found += judge_node(facts_here, None, image, runs_jobs=is_node)
    else:
        answers = ask_nodes(num_nodes, root, config.cluster)
        found += judge_nodes(answers, num_nodes, _expected_gpus(config), image)
    partition, qos, account = place_in_cluster(config)
    profile = profile_of(
        config.cluster.name,
        facts,
        answers.reports,
        partition=partition,
        qos=qos,
        account=account,
        python=config.cluster.python,
    )
    return Examination(tuple(found), profile)


def _ask_slurm(config: RunConfig) -> tuple[ClusterFacts, list[SiteFinding]]:
    try:
        return probe_cluster(*place_in_cluster(config)), []
    except UsageError as error:
        return ClusterFacts(), [fail("Slurm", str(error), "name another one: --partition, or in the profile")]


def _judge_script(config: RunConfig, root: Path) -> list[SiteFinding]:
    """Say how much of a script can be promised, and what spoils it."""
    if config.stage != "script":
        return []
    try:
        checked = workload_of("script").check_settings(with_absolute_paths(config), Facts(RunDir(root)))
    except UsageError as error:
        return [fail("script", str(error), "")]
    promise, *traps = checked.notes
    return [ok("script", promise), *(warn("script", trap, "") for trap in traps)]


def _needs(config: RunConfig, facts: ClusterFacts, here: bool) -> tuple[int | None, list[SiteFinding]]:
    """Return (bytes of the checkpoints it keeps, findings from the plan)."""
    try:
        decision = decide(config, "slurm" if here else "local", assumed_gpus_per_node=0, facts=facts)
    except R1hpcError as error:
        return None, [fail("job", str(error), "fix the job as the message says")]
    size = decision.plan.checkpoint_bytes
    # The new checkpoint is complete before the oldest is removed.
    needed = None if size is None else size * (config.checkpoint.keep + 1)
    return needed, [ok("job", "; ".join(decision.notes) or "it fits the partition")]


def _expected_gpus(config: RunConfig) -> int | None:
    given = config.resources.gpus_per_node
    if given is None:
        given = config.cluster.gpus_per_node
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return given if given is not None else int(allocated) if allocated.isdecimal() else None
