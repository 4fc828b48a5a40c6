"""From a stage's name to the program of its ranks."""

import importlib

from r1hpc.train.loop.session import Job, Outcome

_PROGRAMS = {
    "pretrain": ("pretrain", "run"),
    "sft": ("sft", "run"),
    "rl": ("rl", "run"),
    "traces": ("generate", "traces"),
    "generate": ("generate", "generate"),
    "evaluate": ("generate", "evaluate"),
}


def run(job: Job) -> Outcome:
    """Run the stage of the configuration on this rank."""
    module, function = _PROGRAMS[job.config.stage]
    # By name: a stage's imports (tasks, readers, peft) are paid for only where it runs.
    program = getattr(importlib.import_module(f"r1hpc.train.{module}"), function)
    outcome: Outcome = program(job)
    return outcome
