"""Record which checkpoints that a script wrote by itself are complete, in script-checkpoints.jsonl.

script/checkpoints.py and client/torch_save.py record them. `progress` tells begin and end how
far the script got.
"""

import os
import re
from pathlib import Path

from r1hpc.base.files import append_record, iter_objects
from r1hpc.base.run_dir import RunDir

Print = tuple[int, int, int]
"""Number of files, their bytes, the newest change in ns: another print, another content."""


def record_complete(run: RunDir, path: Path) -> None:
    """Record that a file or folder is complete as it is now."""
    if found := print_of(path):
        append_record(_file(run), {"path": str(path), "print": list(found)})


def recorded(run: RunDir) -> dict[str, Print]:
    """Return the newest record of each path."""
    lines = [line for _, line in iter_objects(_file(run)) if line and {"path", "print"} <= line.keys()]
    return {str(line["path"]): tuple(line["print"]) for line in lines}


def progress(run: RunDir) -> int | None:
    """Return the number in the newest one's name if names differ by it (checkpoint-180), else their count."""
    paths = [str(line.get("path")) for _, line in iter_objects(_file(run)) if line]
    numbers = [int(found[-1]) for path in paths if (found := re.findall(r"\d+", Path(path).name))]
    is_numbered = len(numbers) == len(paths) and len(set(numbers)) > 1
    return max(len(paths), numbers[-1] if is_numbered else 0) or None


def print_of(path: Path) -> Print | None:
    """Return the print of a file or folder; None if it vanishes."""
    tree = [Path(top) / name for top, _, names in os.walk(path) for name in names]
    try:
        stats = [file.stat() for file in ([path] if path.is_file() else tree)]
    except OSError:
        return None
    newest = max((each.st_mtime_ns for each in stats), default=0)
    return len(stats), sum(each.st_size for each in stats), newest


def _file(run: RunDir) -> Path:
    return run.path / "script-checkpoints.jsonl"
