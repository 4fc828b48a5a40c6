"""Estimate what a job file would cost, without a cluster: as `submit` would, on a given number of GPUs."""

from collections.abc import Sequence
from dataclasses import replace

from r1hpc.attempt.workload import workload_of
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.units import parse_time
from r1hpc.config import load, paths
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.hours.estimate import Estimate, seed_estimate, text_gigabytes
from r1hpc.plan.hours.estimate_run import as_if_on_gpus
from r1hpc.plan.hours.goodput import FailureRates
from r1hpc.plan.run import RunPlan, make_plan
from r1hpc.plan.topology.gpus import find_gpu
from r1hpc.submission.plan_run import ASSUMED_GPUS_PER_NODE


def estimate_job(
    job: str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    rates: FailureRates | None = None,
    by_article: bool = False,
) -> Estimate:
    """Estimate one run.

    Args:
        cluster: name of a profile.
        gpu, num_gpus: replace those of the job.
        rates: the site's own failures and preemptions; None takes published ones.
        by_article: use the article's formula instead.

    Raises:
        ConfigError, UsageError: it cannot run as described, or its size is unknown.
    """
    config = paths.with_absolute_paths(load.load(job, overrides, cluster))
    if gpu is not None:
        cluster_of = replace(config.cluster, gpu_type=find_gpu(gpu).name)
        config = replace(config, cluster=cluster_of, resources=replace(config.resources, gpu_type=None))
    if config.stage == "serve":
        raise UsageError(
            f"{printable(job)} is a server: it costs its GPUs x running time, at most the time limit"
        )
    uncounted = ""
    try:
        config = workload_of(config.stage).complete(config)
    except UsageError as error:  # the files may exist only on the cluster
        uncounted = f"the questions of the test files could not be counted: {error}"
    plan = _plan(config, num_gpus)
    found = workload_of(config.stage).estimate(config, plan, rates)
    if found is None:
        raise UsageError(
            f"{printable(job)}: the model's parameters are not known before it is built; give "
            "--params and --tokens in its place"
        )
    if by_article:
        return seed_estimate(float(plan.num_parameters or 0), text_gigabytes(plan.total_tokens))
    if found.gpu_hours is None:
        rules, memory = as_if_on_gpus(config, plan)
        found = replace(found, baselines=rules, memory=memory)
    return replace(found, notes=(*found.notes, uncounted)) if uncounted else found


def _plan(config: RunConfig, num_gpus: int | None) -> RunPlan:
    asked, nodes = config.resources.gpus_per_node, config.resources.nodes
    per_node = config.cluster.gpus_per_node if asked is None else asked
    per_node = ASSUMED_GPUS_PER_NODE if per_node is None else per_node
    if num_gpus is not None and per_node:
        per_node, nodes = _spread(num_gpus, per_node)
    limit = config.resources.time
    return make_plan(
        config,
        gpus_per_node=per_node,
        num_nodes=nodes,
        vocab_size=workload_of(config.stage).vocab_size(config),
        time_limit_s=None if limit is None else parse_time(limit),
    )


def _spread(num_gpus: int, per_node: int) -> tuple[int, int]:
    """Return (GPUs per node, nodes) that make num_gpus."""
    if num_gpus < 1:
        raise UsageError(f"--num-gpus is {num_gpus}: it must be at least 1")
    if num_gpus <= per_node:
        return num_gpus, 1
    if num_gpus % per_node:
        raise UsageError(f"--num-gpus {num_gpus} is not a multiple of the {per_node} GPUs of a node")
    return per_node, num_gpus // per_node
