"""Find the run a command is about, named or the newest (yours first); list the runs under a run root.

run_dir.py only opens a run that is named; this file also knows chains, sweeps and the default.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1hpc.base.cli import add_run_root, offer
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import CHAIN, SWEEP, RunDir, is_chain_or_sweep, open_run, places_of, run_root_of

RUN_NAMES = f"{__name__}:run_names"
"""For base.cli.offer."""


def add_run(parser: argparse.ArgumentParser, what: str = "a run: its folder or its name") -> None:
    """Add the argument for the run, and --run-root."""
    offer(
        parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help=f"{what}; default the newest"),
        RUN_NAMES,
    )
    add_run_root(parser)


def run_names(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Complete run names under the run root, and a chain's stages once the chain is named."""
    chain, slash, _name = prefix.rpartition("/")
    folder = run_root_of(getattr(parsed_args, "run_root", None)) / chain
    marks = ("config.yaml", "attempts.jsonl", CHAIN, SWEEP)
    found = [path.name for path in _folders(folder) if any((path / mark).is_file() for mark in marks)]
    return [f"{chain}{slash}{name}" for name in found]


def existing_run_root(given: str | None) -> Path:
    """Return the run root; raise UsageError if there is no such folder."""
    root = run_root_of(given)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {root.absolute()}: set it with --run-root DIR or R1HPC_RUN_ROOT"
        )
    return root


def choose_run(
    given: str | None, run_root: str | None, pick: Callable[[RunDir], bool] | None = None
) -> RunDir:
    """Return the run folder `given`, or of that name under the run root; by default your newest run there.

    A chain stands for the newest of its stages that `pick` holds for; without `pick` it is refused. Raise
    UsageError if there is no such run, or none at all.
    """
    root = run_root_of(run_root)
    if given is None:
        runs = list_runs(root)
        if not runs:
            for path in folders_with(root, SWEEP):
                raise _sweep_error(path)
            raise UsageError(
                f"there is no run under {root.absolute()}: name a run folder, or say where runs lie "
                "with --run-root DIR or R1HPC_RUN_ROOT"
            )
        return open_run(next((run for run in runs if is_yours(run.path)), runs[0]).path)
    for path in places_of(given, run_root):
        if (path / CHAIN).is_file():
            begun = [RunDir(each) for each in folders_with(path, "attempts.jsonl")]
            begun.sort(key=lambda run: _time_of(run.attempts) or 0.0, reverse=True)
            if pick is not None and (stage := next(filter(pick, begun), None)) is not None:
                print(f"{path.name}: stage {stage.run_id}", file=sys.stderr)
                return open_run(stage.path)
            raise UsageError(f"{path} is a chain of stages: name one of them, {path / 'STAGE'}")
        if (path / SWEEP).is_file():
            raise _sweep_error(path)
    if run_root and ((root / given).is_dir() or not Path(given).exists()):
        return open_run(root / given)
    return open_run(given)


def has_model(run: RunDir) -> bool:
    return (run.model / "config.json").is_file()


def model_of(run: RunDir, use: str) -> Path:
    """Return the folder of the run's trained model.

    Raise StateError, which tells how to make one of a checkpoint and then to `use` it, if there is none yet.
    """
    if not has_model(run):
        raise StateError(
            f"{run.run_id} has left no model yet: `python -m r1hpc.export {run.path} --out DIR` makes one of "
            f"its newest checkpoint; then {use} DIR"
        )
    return run.model


def _sweep_error(path: Path) -> UsageError:
    return UsageError(f"{path} is a sweep: see it by `r1hpc sweep {path}`, or name {path / 'POINT'}")


def list_runs(root: Path) -> list[RunDir]:
    """Return the runs under a run root, the last submitted first, without those of `unreadable`."""
    times = {path: _time_of(path / "config.yaml") for path in _folders(root)}
    found = [(time, path.name, path) for path, time in times.items() if time is not None]
    return [RunDir(path) for _, _, path in sorted(found, reverse=True)]


def is_yours(path: Path) -> bool:
    """True if a folder belongs to you: colleagues may share the run root."""
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def all_runs(root: Path) -> list[RunDir]:
    """Return the runs under a run root and the stages of its chains, a reused stage once; newest first."""
    found = list_runs(root)
    for path in _folders(root):
        if _time_of(path / "config.yaml") is None:
            found += [run for run in list_runs(path) if not run.path.is_symlink()]
    return sorted(found, key=lambda run: _time_of(run.config) or 0.0, reverse=True)


def unreadable(root: Path) -> list[str]:
    """Return a sentence on each folder that may be a run but cannot be read as one."""
    said = []
    folders = _folders(root)
    inside = [inner for path in folders if _time_of(path / "config.yaml") is None for inner in _folders(path)]
    for path in (*folders, *inside):
        try:
            if (path / "attempts.jsonl").is_file() and not (path / "config.yaml").is_file():
                said.append(f"{path} is left out: it has attempts.jsonl and no config.yaml")
        except OSError as error:
            said.append(f"{path} is left out: {error.strerror}")
    return said


def folders_with(root: Path, mark: str) -> list[Path]:
    """Return the subfolders that contain a file of this name; unreadable ones are left out."""
    return [path for path in _folders(root) if _time_of(path / mark) is not None]


def _folders(root: Path) -> list[Path]:
    """Return the subfolders of a folder; empty if it is no folder or cannot be read."""
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []


def _time_of(mark: Path) -> float | None:
    """Return the time a file was written; None if it is missing or cannot be read."""
    try:
        return mark.stat().st_mtime if mark.is_file() else None
    except OSError:
        return None


def flat_name(run: RunDir) -> str:
    """Return full_name as one file name or id; no name contains `+`, so it stays unique."""
    return full_name(run).replace("/", "+")


def full_name(run: RunDir) -> str:
    """Return the run's name, or CHAIN/STAGE (or SWEEP/POINT), since every chain may have an `sft`."""
    above = run.path.parent
    return f"{above.name}/{run.run_id}" if is_chain_or_sweep(above) else run.run_id
