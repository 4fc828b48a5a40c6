"""Fill in what a run leaves open, from the cluster: executor, GPUs per node, time limit, warning signal.

Submissions and `doctor` call `decide`, which also makes the run's plan. It refuses a partition that does not
exist and a time above its limit.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_time, parse_time
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.stages import in_parts, is_rl, is_server
from r1hpc.plan.run import RunPlan, describe_save, make_plan
from r1hpc.plan.save_time import (
    SERVER_LEAVES_S,
    PreemptionRules,
    SaveSpeed,
    judge_server,
    judge_window,
    signal_lead_s,
)
from r1hpc.plan.topology.parts import idle_ranks, with_part_size
from r1hpc.slurm.client import NO_CONFIGURATION, SlurmError, call
from r1hpc.slurm.probe import ClusterFacts, probe_cluster
from r1hpc.slurm.script import DEFAULT_SIGNAL_LEAD_S

_RESOLVER_S = 30.0
"""Without slurm.conf, sbatch asks DNS for a server of it: a silent name server costs ten seconds and more."""


@dataclass(frozen=True)
class Decision:
    """A configuration with nothing left open, and derived facts."""

    config: RunConfig
    plan: RunPlan
    notes: tuple[str, ...]
    num_nodes: int | None = None
    """Nodes of the requested partition; None: unknown."""

    def refuse_missing_nodes(self) -> None:
        """Raise UsageError for more nodes than exist. MaxNodes may be exceeded by a QOS (sacctmgr(1),
        PartitionMaxNodes)."""
        asked = self.config.resources.nodes
        if self.num_nodes and asked > self.num_nodes:
            partition = place_in_cluster(self.config)[0]
            raise UsageError(f"--nodes {asked} is more than the {self.num_nodes} of partition {partition}")


def choose_executor(requested: str, will_submit: bool) -> tuple[str, list[str]]:
    """Return `slurm` or `local`, and a note if it was not requested.

    `auto` chooses Slurm wherever it exists, even if it does not answer now: a login node must not start
    training because slurmctld restarts. A dry run shows the Slurm script unless `local` is requested. Raise
    UsageError if `slurm` is requested and there is no sbatch.
    """
    if requested == "slurm" and will_submit and shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on PATH: run this on a login node, or take --executor local")
    if requested != "auto":
        return requested, []
    if not will_submit or slurm_is_here():
        return "slurm", []
    return "local", ["no Slurm here: the run starts on this machine (--executor local)"]


def slurm_is_here() -> bool:
    """True if this machine is a client of some Slurm cluster, even if it cannot be reached now."""
    found = shutil.which("sbatch")
    return found is not None and _has_configuration(found, os.environ.get("SLURM_CONF"))


@functools.cache
def _has_configuration(sbatch: str, slurm_conf: str | None) -> bool:
    try:
        call([sbatch, "--version"], _RESOLVER_S)  # reads slurm.conf, contacts nobody
    except SlurmError as error:
        return NO_CONFIGURATION not in error.stderr
    return True


def decide(
    config: RunConfig,
    executor: str,
    *,
    vocab_size: int | None = None,
    assumed_gpus_per_node: int | None = None,
    facts: ClusterFacts | None = None,
    expected_model: Mapping[str, Any] | None = None,
    expected_teacher: Mapping[str, Any] | None = None,
    save_speed: SaveSpeed | None = None,
    has_nodes: bool = False,
) -> Decision:
    """Fill in what `config` leaves open.

    Raise UsageError if the GPUs of a node are unknown, there is no such partition, or the time is more than
    it allows. Raise ConfigError if the plan refuses it.

    Args:
        vocab_size, expected_model, expected_teacher, save_speed: as in `make_plan`.
        assumed_gpus_per_node: used if it is unknown; None refuses instead.
        facts: the cluster's facts; None asks it now, if the executor is slurm and Slurm is here.
        has_nodes: the job has its nodes already, whatever the partition's limit is.
    """
    facts = facts or ask_cluster(executor, *place_in_cluster(config))
    gpus, notes = _gpus_per_node(config, facts, executor, assumed_gpus_per_node)
    time, time_notes = _time(config, facts, executor, has_nodes)
    if is_server(config.stage) and config.resources.gpus_per_node is None:
        gpus = min(gpus, 1)
    settled = dataclasses.replace(config.resources, gpus_per_node=gpus, time=time)
    config = dataclasses.replace(config, resources=settled)
    limit_s = parse_time(time) if time else None
    plan = make_plan(
        config,
        gpus_per_node=gpus,
        vocab_size=vocab_size,
        time_limit_s=limit_s,
        # A local run has this machine's GPUs, into however many nodes it is divided.
        max_nodes=config.resources.nodes if executor == "local" else facts.num_nodes,
        expected_model=expected_model,
        expected_teacher=expected_teacher,
        save_speed=save_speed,
    )
    there = facts.gpus_per_node or 0
    if settled.exclusive and 0 < gpus < there:
        notes.append(
            f"whole nodes (exclusive) have {there} GPUs each and are charged for them: the hours told here "
            f"are of the {gpus} asked for. Take --gpus-per-node {there}, or leave `exclusive` out"
        )
    notes += time_notes
    if is_rl(config.stage) or in_parts(config.stage):
        config = with_part_size(config, plan.topology.world_size)
        notes += idle_ranks(config, plan.topology.world_size)
    leaving_s = SERVER_LEAVES_S if is_server(config.stage) else plan.save_time_s
    lead_s = signal_lead_s(settled.signal_lead_s, leaving_s, limit_s)
    config = dataclasses.replace(config, resources=dataclasses.replace(settled, signal_lead_s=lead_s))
    rules = _rules(facts)
    plan = dataclasses.replace(plan, warning_window_s=rules.warning_window_s if rules else None)
    failures = facts.unknown
    if failures and not facts.reachable:
        failures = failures[:1]  # a cluster that does not answer would give five equal notes
    notes += [f"not learnt from the cluster: {failure}" for failure in failures]
    if executor == "slurm":
        notes += _warning(config, plan, rules, lead_s)
    return Decision(config, plan, tuple(notes), facts.num_nodes)


def overrides_of_allocation(environ: Mapping[str, str], is_cpu_run: bool) -> list[str]:
    """Return sbatch's real values, from the variables of the job, as overrides that come last. The job file
    sets `is_cpu_run`: an exclusive node brings its GPUs to any job."""
    found = [f"resources.nodes={environ['SLURM_JOB_NUM_NODES']}"]
    if environ.get("SLURM_GPUS_ON_NODE") and not is_cpu_run:
        found.append(f"resources.gpus_per_node={environ['SLURM_GPUS_ON_NODE']}")
    for key in ("partition", "account", "qos"):
        if environ.get(f"SLURM_JOB_{key.upper()}"):
            found.append(f"resources.{key}={json.dumps(environ[f'SLURM_JOB_{key.upper()}'])}")
    start, end = environ.get("SLURM_JOB_START_TIME"), environ.get("SLURM_JOB_END_TIME")
    if start and end:
        limit_s = int(end) - int(start)
        found += [
            f'resources.time="{format_time(limit_s)}"',
            f"resources.signal_lead_s={min(DEFAULT_SIGNAL_LEAD_S, limit_s - 1)}",
        ]
    return found


def place_in_cluster(config: RunConfig) -> tuple[str | None, str | None, str | None]:
    """Return partition, QOS and account of a run: its own, else its profile's."""
    own, site = config.resources, config.cluster
    return own.partition or site.partition, own.qos or site.qos, own.account or site.account


def ask_cluster(executor: str, partition: str | None, qos: str | None, account: str | None) -> ClusterFacts:
    """Return Slurm's facts about a partition, a QOS and an account; empty without Slurm."""
    if executor != "slurm" or shutil.which("sbatch") is None:
        return ClusterFacts()
    return probe_cluster(partition, qos, account)


def _gpus_per_node(
    config: RunConfig, facts: ClusterFacts, executor: str, assumed: int | None
) -> tuple[int, list[str]]:
    asked = config.resources.gpus_per_node
    if executor == "local":
        return _gpus_of_this_machine(asked, config.resources.nodes, is_dry_run=assumed is not None), []
    if asked is not None:
        return asked, []
    usual = config.cluster.gpus_per_node
    if usual or (usual == 0 and not facts.gpus_per_node):
        return usual, []
    if facts.gpus_per_node is not None:
        if config.stage == "traces":  # needs none
            return facts.gpus_per_node if usual is None else usual, []
        if usual == 0:
            raise UsageError(
                f"the profile says gpus_per_node: 0, and nodes of partition {facts.partition} have "
                f"{facts.gpus_per_node} GPUs: say which by --gpus-per-node N (0 for a CPU run)"
            )
        if facts.gpus_per_node:
            return facts.gpus_per_node, []
        raise UsageError(
            f"the nodes of partition {facts.partition} have no GPU: name one that has (--partition), or say "
            "--gpus-per-node 0 for a CPU run"
        )
    if assumed is not None:
        return assumed, [f"GPUs per node: assumed {assumed}, there is no cluster to ask (--gpus-per-node N)"]
    raise UsageError("the GPUs per node are unknown: give --gpus-per-node N (0 for a CPU run)")


def _gpus_of_this_machine(asked: int | None, nodes: int, is_dry_run: bool) -> int:
    """Return a local run's GPUs; a GPU job does not start on CPUs unless it has `gpus_per_node: 0`."""
    found = num_visible_gpus(len(list(Path("/dev").glob("nvidia[0-9]*"))), os.environ)
    per_node = found // nodes if asked is None else asked
    is_enough = per_node > 0 if asked is None else nodes * asked <= found
    if is_enough or is_dry_run:
        return per_node
    raise UsageError(
        f"this job is for GPUs, and this machine has {found or 'none'}: submit it on a login node of a "
        "cluster, look at it with --dry-run, or start it on CPUs here with resources.gpus_per_node=0"
    )


def num_visible_gpus(num_there: int, environ: Mapping[str, str]) -> int:
    """Count this machine's GPUs in CUDA_VISIBLE_DEVICES, up to the first invalid entry."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return num_there
    known = {str(number) for number in range(num_there)}
    named = takewhile(
        lambda entry: entry in known or entry.startswith(("GPU-", "MIG-")), map(str.strip, listed.split(","))
    )
    return min(num_there, len(set(named)))


def _time(
    config: RunConfig, facts: ClusterFacts, executor: str, has_nodes: bool
) -> tuple[str | None, list[str]]:
    asked, most = config.resources.time, facts.max_time_s
    named, _, _ = place_in_cluster(config)
    is_one = "," not in named if named else not facts.is_routed
    if asked is not None:
        if most is None or has_nodes or parse_time(asked) <= most:
            return asked, []
        said = f"--time {asked} is more than partition {facts.partition} allows ({format_time(most)})"
        if is_one:
            raise UsageError(
                f"{said}: it would wait forever. After its limit a run continues by itself: use that limit"
            )
        return asked, [f"{said}: it waits forever unless another partition takes it"]
    if executor == "local":
        return None, []
    if named and not is_one:
        most = None  # each one has its own limit
    limits = {
        f"the limit of partition {facts.partition}": most,
        "the limit of your QOS or association (MaxWall)": facts.max_wall_s,
    }
    known = {whose: limit for whose, limit in limits.items() if limit is not None}
    if known:
        whose = min(known, key=lambda name: known[name])
        return format_time(known[whose]), [f"time: {format_time(known[whose])}, {whose}"]
    return None, ["time: left to the partition's default, so the ceiling is not known (--time D-HH:MM:SS)"]


def _rules(facts: ClusterFacts) -> PreemptionRules | None:
    if facts.preempt_mode is None or facts.kill_wait_s is None or facts.grace_s is None:
        return None
    return PreemptionRules(
        mode=facts.preempt_mode.upper(),
        grace_s=facts.grace_s,
        kill_wait_s=facts.kill_wait_s,
        sends_user_signal=bool(facts.sends_user_signal),
        max_batch_requeue=5 if facts.max_batch_requeue is None else facts.max_batch_requeue,
    )


def _warning(config: RunConfig, plan: RunPlan, rules: PreemptionRules | None, lead_s: int) -> list[str]:
    if rules is None:
        said = [f"time limit: USR2 {lead_s} s before it", "preemption: unknown, the cluster did not answer"]
    elif is_server(config.stage):
        said = judge_server(rules, lead_s)
    else:
        said = judge_window(plan.save_time_s, rules, lead_s, config.checkpoint.save_every)
    return [*said, *describe_save(plan)]
