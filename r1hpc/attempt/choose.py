"""Which run a door is about: the folder or name it was given, or the newest run under the run root."""

import argparse
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.rundir import RunDir, default_run_root, open_run


def add_run_root(parser: argparse.ArgumentParser) -> None:
    """The --run-root flag, as every door spells it."""
    parser.add_argument("--run-root", metavar="DIR", help="where runs lie; default $R1HPC_RUN_ROOT or ./runs")


def choose_run(given: str | None, run_root: str | None) -> RunDir:
    """The run folder `given`, or of that name under the run root; without one the newest run there.

    Raises:
        UsageError: no such run, or none at all; or it is a chain of them.
    """
    root = Path(run_root) if run_root else default_run_root()
    if given is None:
        runs = list_runs(root)
        if not runs:
            raise UsageError(
                f"there is no run under {root.absolute()}: name a run folder, or say where runs lie "
                "with --run-root DIR or R1HPC_RUN_ROOT"
            )
        return open_run(runs[0].path)
    for path in (Path(given), root / given):
        if (path / "chain.yaml").is_file():
            raise UsageError(f"{path} is a chain of stages: name one of them, {path / 'STAGE'}")
    if run_root and ((root / given).is_dir() or not Path(given).exists()):
        return open_run(root / given)
    return open_run(given)


def list_runs(root: Path) -> list[RunDir]:
    """The runs under a run root, the one submitted last first."""
    if not root.is_dir():
        return []
    marks = [(RunDir(path), path / "config.yaml") for path in root.iterdir()]
    found = [(mark.stat().st_mtime, run.run_id, run) for run, mark in marks if mark.is_file()]
    return [run for _, _, run in sorted(found, key=lambda item: item[:2], reverse=True)]
