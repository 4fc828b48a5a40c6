"""Report an optimizer's first step if r1hpc does not lead the loop around it. hooks.py calls `attach`.

A script may import a library whose loop we lead and train without it, or in processes of its own. Its
children have this hook alone.
"""

import os
from types import ModuleType
from typing import Any

from r1hpc.base.files import read_object, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.client import run as run_module
from r1hpc.client.job import PID, Job, report_path, unled_path


def attach(optimizer: ModuleType) -> None:
    """Look at the first step of each process, by a hook of torch.optim.optimizer."""
    reported: set[int] = set()

    def after_step(*args: Any) -> None:
        if os.getpid() not in reported:
            reported.add(os.getpid())
            _report()

    optimizer.register_optimizer_step_post_hook(after_step)


def _report() -> None:
    job = Job.around()
    run = RunDir(job.run)
    file = unled_path(run, job.attempt, job.rank)
    if not read_object(report_path(run, job.attempt, job.rank)).get("leader") and not file.exists():
        run_module.give_back_signals()
        is_script = os.environ.get(PID) == str(os.getpid())
        write_json(file, {"pid": os.getpid(), "is_script": is_script})
