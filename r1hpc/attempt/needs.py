"""What a stage of a chain needs: sister runs beside it that must be finished before it may begin.

    write_needs(run, ["traces", "sft"])     # before the stage is submitted
    unmet(run)                              # ["sft"]: not finished yet

Slurm's afterok alone cannot say this: a stopped run ends with status 0, and a run whose cluster forbids
requeueing goes on in another job than the one that was waited for.
"""

import os
from collections.abc import Sequence
from typing import TypedDict

from r1hpc.base.files import read_json, write_json
from r1hpc.base.rundir import RunDir

_FILE = "needs.json"


class _Needs(TypedDict):
    needs: list[str]


def write_needs(run: RunDir, names: Sequence[str]) -> None:
    """Make `run` a stage that may begin once the runs of these names, in the same folder, are finished."""
    write_json(run.path / _FILE, {"needs": list(names)})


def is_stage(run: RunDir) -> bool:
    """Whether the run belongs to a chain."""
    return (run.path / _FILE).is_file()


def unmet(run: RunDir) -> list[str]:
    """The names of the runs that are needed and not finished."""
    if not is_stage(run):
        return []
    names: list[str] = read_json(run.path / _FILE, _Needs)["needs"]
    return [name for name in names if not _is_finished(RunDir(run.path.parent / name))]


def _is_finished(run: RunDir) -> bool:
    # By listing, not by name: NFS remembers for up to a minute that a name was missing.
    return run.path.is_dir() and run.finished.name in os.listdir(run.path)  # noqa: PTH208
