"""Node-hours of a run on CPU ranks, before it starts: for rehearsals, whose estimates would be in GPU-hours.

    cpu_node_hours(plan)     # Spread(0.002, 0.006, 0.019), or None where FLOPs are not known

Nobody publishes such runs. The numbers are those of eleven runs of jobs/smoke.yaml and of the stages of
jobs/r1.yaml: 0.1 to 0.4 M parameters and once 26 M, one core a rank, on two x86 cores that other work shared,
with a local disk, November 2026. Other cores, more of them for a rank, larger models and network file systems
may be several times off in either direction: the interval says so, and gives way to the site's first runs.
"""

import math

from r1hpc.estimator.spread import Spread
from r1hpc.plan.run import RunPlan

CPU_PRIOR = 3
"""Counts the versions of the numbers below: ratios to estimates of another version correct nothing."""
STARTUP_S = 10.0
"""From the allocation to the first step, and from the last step to the end. Measured: 4 to 14 s, of which
3 to 9 until the first step, importing torch for the most part."""
FLOPS_PER_RANK = 4e10
MOST_FLOPS_PER_RANK = 1.3e11
"""Model FLOPs a second of one rank with one core, of a model of 0.4 M parameters and of one of 135 M, whose
matrices are large enough to be multiplied at speed; between them by the logarithm of the parameters.
Measured: 2.8e10 to 5.5e10 by the small models, 1.3e11 by one of 26 M, and 6e10 by it beside other work. All
stages of jobs/smollm2.yaml (135 M) took 0.63 node-hours, of which this gives 0.95: answers are shorter than
they may be."""
_SMALL, _LARGE = 4e5, 1.35e8
SPREAD = 3.0
"""P90/P50 and P50/P10. Those runs took 0.56 to 1.44 times the P50; the rest is for other machines."""


def cpu_node_hours(plan: RunPlan) -> Spread | None:
    """For all steps of the plan in one attempt."""
    if plan.flops_per_token is None:
        return None
    rate = plan.topology.world_size * flops_per_rank(plan.num_parameters or 0)
    work_s = plan.total_tokens * plan.flops_per_token / rate
    hours = plan.topology.num_nodes * (STARTUP_S + work_s) / 3600
    return Spread(hours / SPREAD, hours, hours * SPREAD)


def flops_per_rank(num_parameters: float) -> float:
    """Model FLOPs a second of one rank, which grow with the size of what is multiplied."""
    at = math.log(max(num_parameters, _SMALL) / _SMALL) / math.log(_LARGE / _SMALL)
    return FLOPS_PER_RANK * math.pow(MOST_FLOPS_PER_RANK / FLOPS_PER_RANK, min(1.0, at))
