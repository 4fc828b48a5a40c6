"""Find the run a command is about: the given folder or name, or the newest under the run root."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1hpc.base.cli import add_run_root, offer
from r1hpc.base.errors import UsageError
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
    """Return the run root, which must exist.

    Raises:
        UsageError: there is no such folder.
    """
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

    Args:
        pick: a chain stands for the newest of its stages that this holds for; None: a chain is refused.

    Raises:
        UsageError: no such run, or none at all; or it is a chain, or none of its stages will do.
    """
    root = run_root_of(run_root)
    if given is None:
        runs = list_runs(root)
        if not runs:
            for path in folders_with(root, SWEEP):
                raise _is_sweep(path)
            raise UsageError(
                f"there is no run under {root.absolute()}: name a run folder, or say where runs lie "
                "with --run-root DIR or R1HPC_RUN_ROOT"
            )
        return open_run(next((run for run in runs if is_yours(run.path)), runs[0]).path)
    for path in places_of(given, run_root):
        if (path / CHAIN).is_file():
            stage = _newest_stage(path, pick) if pick is not None else None
            if stage is not None:
                print(f"{path.name}: stage {stage.run_id}", file=sys.stderr)
                return open_run(stage.path)
            raise UsageError(f"{path} is a chain of stages: name one of them, {path / 'STAGE'}")
        if (path / SWEEP).is_file():
            raise _is_sweep(path)
    if run_root and ((root / given).is_dir() or not Path(given).exists()):
        return open_run(root / given)
    return open_run(given)


def _is_sweep(path: Path) -> UsageError:
    return UsageError(f"{path} is a sweep: see it by `r1hpc sweep {path}`, or name {path / 'POINT'}")


def _newest_stage(chain: Path, pick: Callable[[RunDir], bool]) -> RunDir | None:
    begun = [RunDir(path) for path in folders_with(chain, "attempts.jsonl")]
    begun.sort(key=lambda run: _time_of(run.attempts) or 0.0, reverse=True)
    return next(filter(pick, begun), None)


def list_runs(root: Path) -> list[RunDir]:
    """Return the runs under a run root, the last submitted first, without those of `unreadable`."""
    marks = [(RunDir(path), _config_time(path)) for path in _folders(root)]
    found = [(time, run.run_id, run) for run, time in marks if time is not None]
    return [run for _, _, run in sorted(found, key=lambda item: item[:2], reverse=True)]


def is_yours(path: Path) -> bool:
    """True if a folder belongs to you: colleagues may share the run root."""
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def all_runs(root: Path) -> list[RunDir]:
    """Return the runs under a run root and the stages of its chains; the newest first.

    A stage that a chain reuses from another one is that one's.
    """
    found = list_runs(root)
    stages = [run for path in _folders(root) if _config_time(path) is None for run in list_runs(path)]
    found += [run for run in stages if not run.path.is_symlink()]
    return sorted(found, key=lambda run: _config_time(run.path) or 0.0, reverse=True)


def unreadable(root: Path) -> list[str]:
    """Return a sentence on each folder that may be a run but cannot be read as one."""
    said = []
    folders = _folders(root)
    inside = [inner for path in folders if _config_time(path) is None for inner in _folders(path)]
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


def _config_time(path: Path) -> float | None:
    """Return the time a run's config.yaml was written; None if it is missing or cannot be read."""
    return _time_of(path / "config.yaml")


def _time_of(mark: Path) -> float | None:
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
