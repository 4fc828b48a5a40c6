"""metrics/train.jsonl to Weights & Biases. Needs the extra `wandb`; WANDB_MODE=offline needs no network.

    with WandbWriter(run, project="r1hpc", name=flat_name(run)) as writer:
        writer.steps(read_steps(run).effective.values())

The only place for the wandb package. A run keeps its id, `name`, over all its attempts; its
system metrics stay off, because they would be those of the machine that exports.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from r1hpc.base.errors import R1hpcError
from r1hpc.base.rundir import RunDir
from r1hpc.telemetry.metrics import Step
from r1hpc.telemetry.tensorboard import scalars


class WandbWriter:
    """One run of one project."""

    def __init__(self, run: RunDir, project: str, name: str) -> None:
        """
        Args:
            name: its id and name, which no other run of the project may have.

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
            self._run: Any = wandb.init(
                project=project,
                id=name,
                name=name,
                dir=str(folder),
                resume="allow",
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise R1hpcError(
                f"W&B did not begin: {error}; log in with `wandb login`, or set WANDB_MODE=offline and "
                f"upload later with `wandb sync {folder}/wandb/offline-run-*`"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if error is None else 1)

    def steps(self, steps: Iterable[Step]) -> int:
        """The scalars of each step; how many there were. W&B drops steps older than its newest."""
        count = 0
        for step in steps:
            self._run.log(scalars(step), step=step.global_step)
            count += 1
        return count
