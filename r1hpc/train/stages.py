"""From a stage's name to the program of its ranks."""

import importlib

from r1hpc.train.loop import Job, Outcome

_PROGRAMS = {
    "pretrain": "pretrain",
    "sft": "sft",
    "rl": "rl",
    "traces": "traces",
    "generate": "generate",
    "evaluate": "evaluation",
}


def run(job: Job) -> Outcome:
    """Run the stage of the configuration on this rank."""
    # By name: a stage's imports (tasks, readers, peft) are paid for only where it runs.
    program = importlib.import_module(f"r1hpc.train.{_PROGRAMS[job.config.stage]}")
    outcome: Outcome = program.run(job)
    return outcome
