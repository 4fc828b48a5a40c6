"""summary.json of a run: what its ended attempts came to, so that nobody reads their steps again.

    stored = read_summary(run)                   # None: there is none, or it is damaged or outdated
    offset = stored.train.offset(run.train_metrics)
    write_summary(run, stored)                   # atomically; not at all in a folder of somebody else

It may be removed at any time: it is made again from metrics/train.jsonl and metrics/events.jsonl, of which it
keeps how far they were read. Both only grow while a run lives; one that was changed before that point has
another size, another time or other bytes there, and then the summary is not used.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, read_json, write_atomic
from r1hpc.base.records import Amount, Count, Finite, Time
from r1hpc.base.run_dir import RunDir

VERSION = 3
_TAIL_BYTES = 4096
_PARTS = 5
"""Fields of telemetry.timeline.Split."""


class Mark(NamedTuple):
    """How far a file of lines was read."""

    size: Count = 0
    mtime_ns: int = 0
    """Of the whole file; tells where nothing was appended since."""
    tail: str = ""
    """A digest of the last bytes before `size`."""

    def offset(self, path: Path) -> int | None:
        """Where what was appended since begins; None: the file is another one, read it from the start."""
        now = mark_of(path, self.size)
        if now is None or now.tail != self.tail:
            return None
        ends_there = path.exists() and path.stat().st_size == self.size
        return None if ends_there and now.mtime_ns != self.mtime_ns else self.size


def mark_of(path: Path, size: int | None = None) -> Mark | None:
    """The mark at byte `size`, by default the end; None: the file is shorter. A missing file is empty."""
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return None if size else Mark()
    with file:
        status = path.stat()
        at = status.st_size if size is None else size
        if at > status.st_size:
            return None
        file.seek(max(0, at - _TAIL_BYTES))
        tail = file.read(min(at, _TAIL_BYTES))
    return Mark(at, status.st_mtime_ns, hashlib.sha256(tail).hexdigest()[:16] if at else "")


@dataclass(frozen=True)
class StoredAttempt:
    """One ended attempt. Times in whole milliseconds, steps None where there was none."""

    attempt: int
    facts: str
    """What attempts.jsonl said of it: with another beginning or end its steps count otherwise."""
    end: Time
    split: tuple[Count, ...]
    """As telemetry.timeline.Split has them."""
    first_step: Count | None
    last_step: Count | None
    last_useful: Count | None
    num_steps: Count
    num_lost: Count
    mfu_s: Finite
    """MFU x seconds, summed over the useful steps that have it, and those seconds."""
    mfu_time_s: Amount
    has_steps: bool


@dataclass(frozen=True)
class StoredSummary:
    """The file."""

    stage: str
    job_name: str
    config: Mark
    train: Mark
    events: Mark
    attempts: tuple[StoredAttempt, ...] = ()
    num_bad_lines: Count = 0
    """Lines of the part of train.jsonl that was read which hold no step."""
    cuts: Mapping[str, Sequence[Count]] = field(default_factory=dict)
    """BEGIN-END, milliseconds since 1970: the split of a time that cuts through attempts."""


def read_summary(run: RunDir) -> StoredSummary | None:
    """What is stored; None where there is nothing, or what is there cannot be used."""
    try:
        value = read_json(run.summary, StoredSummary)
        if value.pop("version", None) != VERSION:
            return None
        value |= {key: Mark(*value[key]) for key in ("config", "train", "events")}
        value["attempts"] = tuple(_attempt(each) for each in value["attempts"])
        if any(len(split) != _PARTS for split in value["cuts"].values()):
            return None
        return StoredSummary(**value)
    except (FileNotFoundError, StateError, TypeError, KeyError):
        return None


def _attempt(value: dict[str, Any]) -> StoredAttempt:
    stored = StoredAttempt(**{**value, "split": tuple(value["split"])})
    if len(stored.split) != _PARTS:
        raise TypeError("not a split")
    return stored


def write_summary(run: RunDir, stored: StoredSummary) -> None:
    """Replace the file; a folder that cannot be written, or a full disk, keeps what it has."""
    text = json.dumps({"version": VERSION, **asdict(stored)}) + "\n"
    with contextlib.suppress(OSError):
        write_atomic(run.summary, text)
