"""Store a run's summary.json: the results of its ended attempts, so that their steps are read once.

The file may be removed at any time and is rebuilt from metrics/train.jsonl and metrics/events.jsonl; it
records how far both were read. Both only grow while a run lives. If one changed before that point, its size,
time or bytes there differ, and the summary is not used.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, parse_json, write_atomic
from r1hpc.base.records import Amount, Count, Finite, Time, mistake
from r1hpc.base.run_dir import RunDir

VERSION = 3
_TAIL_BYTES = 4096
_PARTS = 5
"""Fields of telemetry.diagnosis.timeline.Split."""


class Mark(NamedTuple):
    """Position up to which a file of lines was read."""

    size: Count = 0
    mtime_ns: int = 0
    """Time of the whole file; shows that nothing was appended since."""
    tail: str = ""
    """A digest of the last bytes before `size`."""

    def offset(self, path: Path) -> int | None:
        """Return the offset of the bytes appended since; None: another file, read it from the start."""
        now = mark_of(path, self.size)
        if now is None or now.tail != self.tail:
            return None
        ends_there = path.exists() and path.stat().st_size == self.size
        return None if ends_there and now.mtime_ns != self.mtime_ns else self.size


def mark_of(path: Path, size: int | None = None) -> Mark | None:
    """Return the mark at byte `size`, by default the end; None if the file is shorter. Missing: size 0."""
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
    """One ended attempt. Times in whole milliseconds, steps None if there was none."""

    attempt: int
    facts: str
    """Its record in attempts.jsonl: with another begin or end its steps count differently."""
    end: Time
    split: tuple[Count, ...]
    """In the order of telemetry.diagnosis.timeline.Split."""
    first_step: Count | None
    last_step: Count | None
    last_useful: Count | None
    num_steps: Count
    num_lost: Count
    mfu_s: Finite
    """MFU x seconds, summed over the useful steps with an MFU, and those seconds."""
    mfu_time_s: Amount
    has_steps: bool


@dataclass(frozen=True)
class StoredSummary:
    stage: str
    job_name: str
    config: Mark
    train: Mark
    events: Mark
    attempts: tuple[StoredAttempt, ...] = ()
    num_bad_lines: Count = 0
    """Lines in the part of train.jsonl already read that have no step."""
    cuts: Mapping[str, Sequence[Count]] = field(default_factory=dict)
    """BEGIN-END, milliseconds since 1970: the split of a time that cuts through attempts."""


def read_summary(run: RunDir) -> StoredSummary | None:
    """Return the stored summary; None if there is none or it cannot be used."""
    try:
        with open_plain(run.summary) as file:
            return _parse(file.read())
    except (FileNotFoundError, StateError):
        return None


@functools.lru_cache(maxsize=1)
def _parse(raw: bytes) -> StoredSummary | None:
    """Parse a file; one command reads the same one several times, one run after the other."""
    try:
        value = parse_json(raw)
        if mistake(value, StoredSummary) is not None or value.pop("version", None) != VERSION:
            return None
        value |= {key: Mark(*value[key]) for key in ("config", "train", "events")}
        attempts = [StoredAttempt(**{**each, "split": tuple(each["split"])}) for each in value["attempts"]]
        splits = [*value["cuts"].values(), *(each.split for each in attempts)]
        if any(len(split) != _PARTS for split in splits):
            return None
        return StoredSummary(**{**value, "attempts": tuple(attempts)})
    except (ValueError, TypeError, KeyError):
        return None


def write_summary(run: RunDir, stored: StoredSummary) -> None:
    """Replace the file; an unwritable folder or a full disk keeps the old one."""
    text = json.dumps({"version": VERSION, **asdict(stored)}) + "\n"
    with contextlib.suppress(OSError):
        write_atomic(run.summary, text)
