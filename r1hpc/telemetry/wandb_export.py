"""metrics/train.jsonl to Weights & Biases. Needs the extra `wandb`; WANDB_MODE=offline needs no network.

    count = export_steps(run, read_steps(run).effective.values(), project="r1hpc", name=flat_name(run))

The only place for the wandb package. A run keeps its id, `name`, over all its attempts; its
system metrics stay off, because they would be those of the machine that exports.
"""

from collections.abc import Iterable

from r1hpc.base.errors import R1hpcError
from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.metrics import Step
from r1hpc.telemetry.tensorboard import scalars


def export_steps(run: RunDir, steps: Iterable[Step], project: str, name: str) -> int:
    """The scalars of each step; how many there were. W&B drops steps older than its newest.

    Args:
        name: the run's id and name, which no other run of the project may have.

    Raises:
        R1hpcError: the wandb package is not installed, or it could not begin: no key, no network.
    """
    try:
        # Deferred: a second, and an extra.
        import wandb
    except ImportError:
        raise R1hpcError("the wandb package is not installed; run: pip install 'r1hpc[wandb]'") from None
    settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
    folder = run.report
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        opened = wandb.init(
            project=project, id=name, name=name, dir=str(folder), resume="allow", settings=settings
        )
    except wandb.errors.Error as error:
        raise R1hpcError(
            f"W&B did not begin: {error}; log in with `wandb login`, or set WANDB_MODE=offline and "
            f"upload later with `wandb sync {folder}/wandb/offline-run-*`"
        ) from None
    count, failed = 0, True
    try:
        for step in steps:
            opened.log(scalars(step), step=step.global_step)
            count += 1
        failed = False
    finally:
        opened.finish(exit_code=int(failed))
    return count
