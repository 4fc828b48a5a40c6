"""Run every check of `doctor`, in order: Slurm, the run root, the job, this machine or the nodes.

The judges of Slurm itself and of the job are here; the others have a module each.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import Facts, workload_of
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_duration, format_time
from r1hpc.config.load import load
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.save_time import ends_jobs
from r1hpc.preflight.findings import SiteFinding, fail, ok, unknown, warn
from r1hpc.preflight.node import collect_node, judge_node
from r1hpc.preflight.nodes import Answers, ask_nodes, judge_nodes
from r1hpc.preflight.profile import profile_of
from r1hpc.preflight.storage import collect_storage, judge_storage
from r1hpc.preflight.versions import ask_versions
from r1hpc.slurm import fields
from r1hpc.slurm.defaults import decide, place_in_cluster, slurm_is_here
from r1hpc.slurm.flags import overrides_from_environment
from r1hpc.slurm.probe import ClusterFacts, probe_cluster

_SHORT_S = 3600
_SHORT_WARNING_S = 30


@dataclass(frozen=True)
class Examination:
    findings: tuple[SiteFinding, ...]
    profile: dict[str, Any]


def examine(
    job: str | None,
    root: Path,
    num_nodes: int | None,
    cluster: str | None,
    partition: str | None = None,
    overrides: Sequence[str] = (),
) -> Examination:
    """Check this machine, or `num_nodes` nodes of the current allocation.

    `partition` replaces that of SBATCH_PARTITION, the job, the profile or Slurm's default. Raise ConfigError
    if the job or the profile cannot be read; UsageError for `num_nodes` outside an allocation or more than it
    has, or an invalid SBATCH_* variable or profile.
    """
    config = load(job, [*overrides_from_environment(os.environ), *overrides], cluster)
    fields.check_cluster(config.cluster)
    if partition is not None:
        config = replace(config, resources=replace(config.resources, partition=partition))
    here = slurm_is_here()
    facts = ClusterFacts()
    try:
        facts = probe_cluster(*place_in_cluster(config)) if here else facts
        found = judge_cluster(facts, here)
    except UsageError as error:
        found = [fail("Slurm", str(error), "name another one: --partition, or in the profile")]
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
    return Examination(tuple(found), profile_of(config, facts, answers.nodes))


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
    fits = "it fits the partition" if here else "there is no Slurm here to compare it with"
    return needed, [ok("job", "; ".join(decision.notes) or fits)]


def _expected_gpus(config: RunConfig) -> int | None:
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    for given in (config.resources.gpus_per_node, config.cluster.gpus_per_node):
        if given is not None:
            return given
    return int(allocated) if allocated.isdecimal() else None


def judge_cluster(facts: ClusterFacts, slurm_is_here: bool) -> list[SiteFinding]:
    """Judge whether Slurm answers, the partition's time limit, preemption and requeue."""
    if not slurm_is_here:
        return [unknown("Slurm", "this machine belongs to no cluster", "run it on a login node of one")]
    if not facts.reachable:
        said = facts.unknown[0] if facts.unknown else "no answer"
        return [fail("Slurm", said.splitlines()[0], "try again; if it stays so, ask the administrators")]
    return [
        ok("Slurm", f"{facts.version}, partition {facts.partition}, QOS {facts.qos or 'not known'}"),
        _judge_time(facts),
        _judge_preemption(facts),
        _judge_requeue(facts),
        *(unknown("Slurm", each.splitlines()[0]) for each in facts.unknown),
    ]


def _judge_time(facts: ClusterFacts) -> SiteFinding:
    if facts.max_time_s is None:
        return ok("time limit", f"partition {facts.partition} has none, or does not say")
    detail = f"partition {facts.partition} allows {format_time(facts.max_time_s)}"
    if facts.max_time_s < _SHORT_S:
        fix = (
            "start-up and the last save come out of that each time: take a partition with more (--partition)"
        )
        return warn("time limit", detail, fix)
    return ok("time limit", detail)


def _judge_preemption(facts: ClusterFacts) -> SiteFinding:
    mode = facts.preempt_mode
    if mode is None:
        return unknown("preemption", "Slurm does not say how this partition and QOS preempt")
    if mode.startswith("OFF"):
        return ok("preemption", f"nobody preempts partition {facts.partition}, QOS {facts.qos or 'default'}")
    if not ends_jobs(mode):
        # SUSPEND ignores GraceTime and releases no GRES, slurm.conf(5).
        return ok(
            "preemption",
            f"{mode}: a preempted run is paused in place and continues later. It keeps its nodes, its GPUs "
            "and what is in their memory, and needs no checkpoint. The pause counts neither towards the time "
            "limit nor towards train.hang_timeout_s",
        )
    # With a GraceTime of 0 only KillWait lies between the signal and the end, slurm.conf(5).
    window = facts.grace_s or facts.kill_wait_s
    detail = f"{mode}, {format_duration(window)} from the signal to the end" if window else mode
    if window is not None and window < _SHORT_WARNING_S:
        fix = "save often (checkpoint.save_every): a save may not fit; or take a QOS with a longer GraceTime"
        return warn("preemption", detail, fix)
    return ok("preemption", detail)


def _judge_requeue(facts: ClusterFacts) -> SiteFinding:
    if facts.job_requeue is False:
        fix = "none needed: r1hpc submits with --requeue, or a follow-up job where that is refused"
        return warn("requeue", "JobRequeue=0: Slurm requeues no job that does not ask for it", fix)
    most = facts.max_batch_requeue
    if most is None:
        return ok("requeue", "allowed; MaxBatchRequeue is not known")
    # Seen with Slurm 24.11; _job_complete() and _handle_requeue_limit() in src/slurmctld/job_mgr.c.
    if most <= 1:
        detail = (
            f"MaxBatchRequeue={most}: Slurm holds a job (REQUEUE_HOLD) at its first failed launch or exit "
            "inside the grace time. r1hpc's own requeues do not count, so a preempted run does continue. But "
            "the exit of a finished run that was preempted earlier counts too: its job stays held, and the "
            "next stage of a chain waits for it"
        )
        fix = (
            "scancel a job in REQUEUE_HOLD; then submit its chain again, or the run with --resume if it is "
            "not finished. Only an operator can release it; ask for MaxBatchRequeue=5, Slurm's default"
        )
        return warn("requeue", detail, fix)
    held = f"Slurm holds a job after {most} failed launches or exits inside the grace time"
    return ok("requeue", f"allowed; MaxBatchRequeue={most}: {held}, which r1hpc's own requeues are not")
