"""Which run a command is about: the folder or name it was given, or the newest run under the run root."""

import argparse
import os
from pathlib import Path
from typing import Any

from r1hpc.base.cli import offer
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir, default_run_root, open_run

RUN_NAMES = f"{__name__}:run_names"
"""For base.cli.offer."""
_CHAIN = "chain.yaml"
"""In the folder of a chain, whose stages are runs."""


def add_run_root(parser: argparse.ArgumentParser) -> None:
    """The --run-root flag, as every command spells it."""
    parser.add_argument("--run-root", metavar="DIR", help="where runs lie; default $R1HPC_RUN_ROOT or ./runs")


def add_run(parser: argparse.ArgumentParser, what: str = "a run: its folder or its name") -> None:
    """The run a command is about, and where runs lie."""
    offer(
        parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help=f"{what}; default the newest"),
        RUN_NAMES,
    )
    add_run_root(parser)


def run_names(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """What TAB offers for a run: those under the run root, the stages of a chain once it is named."""
    chain, slash, _name = prefix.rpartition("/")
    folder = run_root_of(getattr(parsed_args, "run_root", None)) / chain
    marks = ("config.yaml", "attempts.jsonl", _CHAIN)
    found = [path.name for path in _folders(folder) if any((path / mark).is_file() for mark in marks)]
    return [f"{chain}{slash}{name}" for name in found]


def run_root_of(given: str | Path | None) -> Path:
    """The run root of --run-root, else the default one."""
    return Path(given) if given else default_run_root()


def existing_run_root(given: str | None) -> Path:
    """As run_root_of.

    Raises:
        UsageError: there is no such folder.
    """
    root = run_root_of(given)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {root.absolute()}: say where runs lie with --run-root DIR or R1HPC_RUN_ROOT"
        )
    return root


def choose_run(given: str | None, run_root: str | None) -> RunDir:
    """The run folder `given`, or of that name under the run root; without one your newest run there.

    Raises:
        UsageError: no such run, or none at all; or it is a chain of them.
    """
    root = run_root_of(run_root)
    if given is None:
        runs = list_runs(root)
        if not runs:
            raise UsageError(
                f"there is no run under {root.absolute()}: name a run folder, or say where runs lie "
                "with --run-root DIR or R1HPC_RUN_ROOT"
            )
        return open_run(next((run for run in runs if is_yours(run.path)), runs[0]).path)
    for path in (Path(given), root / given):
        if (path / _CHAIN).is_file():
            raise UsageError(f"{path} is a chain of stages: name one of them, {path / 'STAGE'}")
    if run_root and ((root / given).is_dir() or not Path(given).exists()):
        return open_run(root / given)
    return open_run(given)


def list_runs(root: Path) -> list[RunDir]:
    """The runs under a run root, the one submitted last first; those of `unreadable` are not among them."""
    marks = [(RunDir(path), _config_time(path)) for path in _folders(root)]
    found = [(time, run.run_id, run) for run, time in marks if time is not None]
    return [run for _, _, run in sorted(found, key=lambda item: item[:2], reverse=True)]


def is_yours(path: Path) -> bool:
    """Whether a folder belongs to you: under a shared run root lie your colleagues' too."""
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def all_runs(root: Path) -> list[RunDir]:
    """The runs under a run root and, one folder deeper, the stages of chains; the newest first."""
    found = list_runs(root)
    found += [run for path in _folders(root) if _config_time(path) is None for run in list_runs(path)]
    return sorted(found, key=lambda run: _config_time(run.path) or 0.0, reverse=True)


def unreadable(root: Path) -> list[str]:
    """A sentence on each folder that holds a run, or may, and cannot be listed as one."""
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
    """The folders in a folder that hold a file of this name; what cannot be read is left out."""
    return [path for path in _folders(root) if _time_of(path / mark) is not None]


def _folders(root: Path) -> list[Path]:
    """The folders in a folder; none where it is none, or cannot be read."""
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []


def _config_time(path: Path) -> float | None:
    """When config.yaml of a run folder was written; None: it has none, or cannot be read."""
    return _time_of(path / "config.yaml")


def _time_of(mark: Path) -> float | None:
    try:
        return mark.stat().st_mtime if mark.is_file() else None
    except OSError:
        return None


def flat_name(run: RunDir) -> str:
    """full_name as one file name or id; `+` is in no name, so that no two runs have the same."""
    return full_name(run).replace("/", "+")


def full_name(run: RunDir) -> str:
    """The run's name; of a stage CHAIN/STAGE, since every chain may have an `sft`."""
    chain = run.path.parent
    return f"{chain.name}/{run.run_id}" if (chain / _CHAIN).is_file() else run.run_id
