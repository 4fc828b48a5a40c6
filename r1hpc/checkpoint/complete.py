"""Record which checkpoints that a script wrote by itself are complete, in script-checkpoints.jsonl.

script/checkpoints.py and client/torch_save.py record them. `progress` tells begin and end how
far the script got.
"""

import os
import re
from itertools import pairwise
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


def record_saved(run: RunDir, path: Path) -> None:
    """Record that a file is complete which the script may rename to a checkpoint (timm's tmp.pth.tar)."""
    append_record(_file(run), {"saved": print_of(path)}, durable=False)


def saved(run: RunDir) -> set[Print]:
    """Return the prints of files that were complete before they were renamed."""
    return {tuple(line["saved"]) for _, line in iter_objects(_file(run)) if line and line.get("saved")}


def progress(run: RunDir) -> int | None:
    """Return the number in the newest one's name, if the names count up (checkpoint-180); else None."""
    named = (line["path"] for _, line in iter_objects(_file(run)) if line and "path" in line)
    paths = list(dict.fromkeys(named))
    numbers = [int(found[-1]) for path in paths if (found := re.findall(r"\d+", Path(str(path)).name))]
    counts_up = len(numbers) == len(paths) and all(a < b for a, b in pairwise(numbers))
    return numbers[-1] if counts_up and len(numbers) > 1 else None


def num_recorded(run: RunDir) -> int:
    """Return how often a checkpoint was complete: progress, though not in steps."""
    return sum("path" in (line or {}) for _, line in iter_objects(_file(run)))


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
