"""What a run leaves open and the cluster answers: the executor, GPUs per node, the time limit, the warning.

decision = decide(config, "slurm")      # asks Slurm; every answer that was assumed is a sentence in notes
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.units import format_time, parse_time
from r1hpc.config.schema import RunConfig
from r1hpc.plan.preemption import PreemptionRules, judge_window, signal_lead_s
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.slurm.client import NO_CONFIGURATION, SlurmError, call
from r1hpc.slurm.probe import ClusterFacts, probe_cluster
from r1hpc.slurm.script import DEFAULT_SIGNAL_LEAD_S


@dataclass(frozen=True)
class Decision:
    """A configuration with nothing left open, and what follows from it."""

    config: RunConfig
    gpus_per_node: int
    plan: RunPlan
    signal_lead_s: int
    notes: tuple[str, ...]


def choose_executor(requested: str, will_submit: bool) -> tuple[str, list[str]]:
    """`slurm` or `local`, and a sentence where that was not asked for.

    `auto` takes Slurm wherever there is one, also when it does not answer right now: a login node must not
    begin to train because slurmctld restarts. A dry run shows the Slurm script unless `local` is asked for.

    Raises:
        UsageError: `slurm` is asked for and there is no sbatch.
    """
    if requested == "slurm" and will_submit and shutil.which("sbatch") is None:
        raise UsageError("sbatch is not on PATH: run this on a login node, or take --executor local")
    if requested != "auto":
        return requested, []
    if not will_submit or slurm_is_here():
        return "slurm", []
    return "local", ["no Slurm here: the run starts on this machine (--executor local)"]


def slurm_is_here() -> bool:
    """Whether this machine is a client of some Slurm cluster, reachable at the moment or not."""
    if shutil.which("sbatch") is None:
        return False
    try:
        call(["sbatch", "--version"], 5.0)  # reads slurm.conf, talks to nobody
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
) -> Decision:
    """Settle what `config` leaves open.

    Args:
        vocab_size: the dataset's, without which the model's size, and so a save's, is not known.
        assumed_gpus_per_node: taken where nobody knows; None refuses instead.
        facts: what the cluster said; None asks it now, where the executor is slurm and Slurm is here.
        expected_model: the config.json that an earlier stage will leave in model.path.

    Raises:
        UsageError: nobody says how many GPUs a node has, no such partition, or more time than it allows.
        ConfigError: what the plan refuses.
    """
    facts = facts or ask_cluster(executor, *place_in_cluster(config))
    gpus, notes = _gpus_per_node(config, facts, executor, assumed_gpus_per_node)
    time, time_notes = _time(config, facts, executor)
    settled = dataclasses.replace(config.resources, gpus_per_node=gpus, time=time)
    config = dataclasses.replace(config, resources=settled)
    limit_s = parse_time(time) if time else None
    plan = make_plan(
        config,
        gpus_per_node=gpus,
        vocab_size=vocab_size,
        time_limit_s=limit_s,
        expected_model=expected_model,
    )
    lead_s = signal_lead_s(settled.signal_lead_s, plan.save_time_s, limit_s)
    config = dataclasses.replace(config, resources=dataclasses.replace(settled, signal_lead_s=lead_s))
    warning = _warning(config, plan, facts, lead_s) if executor == "slurm" else []
    # One command that fails is worth a note; a cluster that does not answer says the same five times.
    failures = facts.unknown if facts.reachable else facts.unknown[:1]
    unknown = [f"not learnt from the cluster: {failure}" for failure in failures]
    return Decision(config, gpus, plan, lead_s, (*notes, *time_notes, *unknown, *warning))


def overrides_of_allocation(environ: Mapping[str, str], is_cpu_run: bool) -> list[str]:
    """What sbatch was really given, from the variables of the job it made, as overrides that come last.

    Args:
        is_cpu_run: the job file says so itself; an exclusive node brings its GPUs to any job.
    """
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
    """Partition, QOS and account of a run: its own, else its profile's."""
    own, site = config.resources, config.cluster
    return own.partition or site.partition, own.qos or site.qos, own.account or site.account


def ask_cluster(executor: str, partition: str | None, qos: str | None, account: str | None) -> ClusterFacts:
    """What Slurm says of a partition, a QOS and an account; nothing where there is no Slurm."""
    if executor != "slurm" or not slurm_is_here():
        return ClusterFacts()
    return probe_cluster(partition, qos, account)


def _gpus_per_node(
    config: RunConfig, facts: ClusterFacts, executor: str, assumed: int | None
) -> tuple[int, list[str]]:
    if config.resources.gpus_per_node is not None:
        return config.resources.gpus_per_node, []
    if executor == "local":
        found = len(list(Path("/dev").glob("nvidia[0-9]*")))
        return found, [] if found else ["no GPU on this machine: a CPU run"]
    if config.cluster.gpus_per_node is not None:
        return config.cluster.gpus_per_node, []
    if facts.gpus_per_node is not None:
        if facts.gpus_per_node:
            return facts.gpus_per_node, []
        return 0, [f"the nodes of partition {facts.partition} have no GPU: a CPU run"]
    if assumed is not None:
        return assumed, [f"GPUs per node: assumed {assumed}, there is no cluster to ask (--gpus-per-node N)"]
    raise UsageError("nobody says how many GPUs a node has: give --gpus-per-node N (0 for a CPU run)")


def _time(config: RunConfig, facts: ClusterFacts, executor: str) -> tuple[str | None, list[str]]:
    asked, most = config.resources.time, facts.max_time_s
    if asked is not None:
        if most is not None and parse_time(asked) > most:
            raise UsageError(
                f"--time {asked} is more than partition {facts.partition} allows ({format_time(most)}): "
                "such a job would wait for ever. A run goes on by itself after its limit, so take that"
            )
        return asked, []
    if executor == "local":
        return None, []
    if most is not None:
        return format_time(most), [f"time: {format_time(most)}, the limit of partition {facts.partition}"]
    return None, ["time: left to the partition's default, so the ceiling is not known (--time D-HH:MM:SS)"]


def _warning(config: RunConfig, plan: RunPlan, facts: ClusterFacts, lead_s: int) -> list[str]:
    if facts.preempt_mode is None or facts.kill_wait_s is None or facts.grace_s is None:
        return [f"time limit: USR2 {lead_s} s before it", "preemption: not known, the cluster did not say"]
    rules = PreemptionRules(
        mode=facts.preempt_mode.upper(),
        grace_s=facts.grace_s,
        kill_wait_s=facts.kill_wait_s,
        sends_user_signal=bool(facts.sends_user_signal),
        requeue_allowed=facts.job_requeue is not False,
        max_batch_requeue=facts.max_batch_requeue or 5,
    )
    return judge_window(plan.save_time_s, rules, lead_s, config.checkpoint.save_every)
