"""Node-hours of a run on CPU ranks, before it starts: a rehearsal of the loop that corrects estimates.

    cpu_node_hours(plan)     # {"p10": 0.004, "p50": 0.013, "p90": 0.038}, or None where FLOPs are not known

Nobody publishes such runs, so the interval is wide on purpose: it gives way at the first runs of the site.
"""

from r1hpc.plan.run import RunPlan

STARTUP_S = 30.0
"""From the allocation to the first step, and from the last step to the end: mostly importing torch from a
network file system. Assumed."""
FLOPS_PER_RANK = 1e10
"""Model FLOPs a second of one rank. Assumed: a core multiplies large float32 matrices at five times that, and
small models spend most of their time between the multiplications."""
SPREAD = 3.0
"""P90/P50 and P50/P10."""


def cpu_node_hours(plan: RunPlan) -> dict[str, float] | None:
    """P10, P50 and P90 for all steps of the plan in one attempt."""
    if plan.flops_per_token is None:
        return None
    work_s = plan.total_tokens * plan.flops_per_token / (plan.topology.world_size * FLOPS_PER_RANK)
    hours = plan.topology.num_nodes * (STARTUP_S + work_s) / 3600
    return {"p10": hours / SPREAD, "p50": hours, "p90": hours * SPREAD}
