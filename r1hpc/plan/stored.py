"""Declare the keys of plan.json that are read from runs of every version, without the planner."""

from typing import TypedDict

from r1hpc.base.records import Amount, Count


class PlanFacts(TypedDict, total=False):
    """Keys of plan.json that are read from runs of every version."""

    num_steps: Count | None
    time_limit_s: Count | None
    warning_window_s: Count | None
    gpu_hours_ceiling: Amount | None
    node_hours_ceiling: Amount | None
    account: str | None
    first_item: Count | None
