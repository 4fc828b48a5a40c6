"""What a submission was asked for: the job, the changes to it, and where it shall lie and run.

order = Order(job="jobs/smoke.yaml", overrides=("train.num_steps=20",), run_name="a")
order.folder("a")        # <run_root>/a
"""

import os
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.names import check_name, printable
from r1hpc.base.run_dir import RunDir, default_run_root
from r1hpc.slurm.fields import check_path, refuse_shell_overrides
from r1hpc.submission.chain.file import without_stage
from r1hpc.submission.chain.folder import ChainDir

DEFAULT_JOB = "train"


class Purpose(StrEnum):
    """What a submission is for."""

    start = "start"
    dry_run = "dry run"
    """Nothing is written, and what only a cluster knows is assumed."""
    estimate = "estimate"
    """A dry run, perhaps on more nodes than there are."""
    inside_job = "inside job"
    """sbatch/train.sh: the job is there, and asks for its folder."""


@dataclass(frozen=True)
class Order:
    """What a submission was asked for, before anything of it is read."""

    purpose: Purpose = Purpose.start
    executor: str = "auto"
    """auto, slurm or local."""
    argv: tuple[str, ...] = ()
    """The command line, for the record."""
    overrides: tuple[str, ...] = ()
    """In order: SBATCH_* variables, KEY=VALUE, flags."""
    cluster: str | None = None
    """Name of a profile."""
    run_root: Path = field(default_factory=default_run_root)
    """Where runs lie, the finished ones that correct estimates among them, and perhaps the budget."""
    over_budget: str | None = None
    """Why the budget may be exceeded, on record."""
    job: str | None = None
    """A job or chain file, or its name in jobs/; None: jobs/train.yaml, or what is frozen."""
    run_name: str | None = None
    """None: a new name."""
    resume: bool = False
    """Go on with the run called run_name."""

    def __post_init__(self) -> None:
        refuse_shell_overrides([without_stage(item) for item in self.overrides])

    @property
    def is_dry_run(self) -> bool:
        return self.purpose in (Purpose.dry_run, Purpose.estimate)

    @property
    def counted_root(self) -> Path:
        """The run root whose budget and whose other runs count: of a chain's stage, that of the chain."""
        root = ChainDir(os.path.abspath(self.run_root))  # noqa: PTH100 (not Path.resolve: links stay)
        is_chain = root.definition.is_file() and not (root.path / "budget.yaml").is_file()
        return root.path.parent if is_chain else self.run_root

    def folder(self, name: str) -> RunDir:
        """The folder of a run or of a chain under the run root.

        Raises:
            UsageError: a name or a path that cannot stand in a job script.
        """
        check_path(self.run_root.absolute(), "--run-root")
        return RunDir(self.run_root / check_name(name, "--run-name"))

    def new_run(self) -> RunDir:
        """The folder of a run that does not exist yet."""
        return self.folder(self.run_name or _new_name(self.job or DEFAULT_JOB))

    def resumed_run(self) -> RunDir:
        """The folder of the run to go on with.

        Raises:
            UsageError: no name, or a job file beside the frozen one.
        """
        if not self.run_name:
            raise UsageError("--resume goes with --run-name NAME: which run?")
        if self.job:
            raise UsageError(
                f"--resume takes the job file frozen in the run: leave {printable(self.job)} out"
            )
        return self.folder(self.run_name)


def _new_name(job: str) -> str:
    return f"{Path(job).stem[:38]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
