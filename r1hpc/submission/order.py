"""Define `Order`, what `submit`, `sweep` or `estimate` was asked for: job, overrides, folder, executor."""

import os
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.names import check_name, printable
from r1hpc.base.run_dir import RunDir, default_run_root, is_chain_or_sweep
from r1hpc.slurm.fields import check_path, refuse_shell_overrides
from r1hpc.submission.chain.file import without_stage

DEFAULT_JOB = "train"
_OF_FILES = (".html", ".yaml", ".json", ".jsonl", ".lock")


class Purpose(StrEnum):
    start = "start"
    dry_run = "dry run"
    """Nothing is written, and facts that only a cluster knows are assumed."""
    estimate = "estimate"
    """A dry run, perhaps on more nodes than there are."""
    inside_job = "inside job"
    """sbatch/train.sh: the job exists, and asks for its folder."""


@dataclass(frozen=True)
class Order:
    """A submission as ordered, before any file is read."""

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
    """Folder of the runs, including the finished ones that correct estimates, and perhaps the budget."""
    over_budget: str | None = None
    """Recorded reason for exceeding the budget."""
    job: str | None = None
    """A job or chain file, or its name in jobs/; None: jobs/train.yaml, or the frozen job."""
    run_name: str | None = None
    """None: a new name."""
    resume: bool = False
    """Continue the run called run_name."""
    from_stage: str | None = None
    """STAGE or CHAIN:STAGE: a new chain takes the stages before it from an earlier one."""
    redo: bool = False
    """Run the stages of a chain again whose input has changed."""
    reuse: tuple[str, ...] = ()
    """CHAIN:STAGE: stages that a new chain takes from others."""

    def __post_init__(self) -> None:
        refuse_shell_overrides([without_stage(item) for item in self.overrides])

    @property
    def is_dry_run(self) -> bool:
        return self.purpose in (Purpose.dry_run, Purpose.estimate)

    @property
    def counted_root(self) -> Path:
        """Return the run root whose budget and runs count: for a stage or point, its chain's or sweep's."""
        root = Path(os.path.abspath(self.run_root))  # noqa: PTH100 (not Path.resolve: links stay)
        has_budget = (root / "budget.yaml").is_file()
        return root.parent if is_chain_or_sweep(root) and not has_budget else self.run_root

    def folder(self, name: str) -> RunDir:
        """Return the folder of a run or chain under the run root.

        Raise UsageError for a name or path that a job script cannot contain.
        """
        check_path(self.run_root.absolute(), "--run-root")
        if self.run_root.exists() and not self.run_root.is_dir():
            raise UsageError(f"--run-root {self.run_root} is a file: name a folder")
        folder = RunDir(self.run_root / check_name(name, "--run-name"))
        if name.endswith(_OF_FILES) and not folder.path.is_dir():  # report.html, budget.yaml
            raise UsageError(
                f"--run-name {name} ends like a file of the run root: leave {Path(name).suffix} out"
            )
        return folder

    def new_run(self) -> RunDir:
        """Return the folder of a run that does not exist yet."""
        job = Path(self.job or DEFAULT_JOB).stem[:38]
        new = f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        return self.folder(self.run_name or new)

    def resumed_run(self) -> RunDir:
        """Return the folder of the run to continue.

        Raise UsageError for no name, or a job file in addition to the frozen one.
        """
        if not self.run_name:
            raise UsageError("--resume goes with --run-name NAME: which run?")
        if self.job:
            raise UsageError(
                f"--resume takes the job file frozen in the run: leave {printable(self.job)} out"
            )
        return self.folder(self.run_name)
