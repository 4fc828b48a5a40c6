"""Read what the ranks of a run print: one file per attempt and rank, from its end, or followed as it grows.

Control characters are removed: a log can hold anything a model or a library printed.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1hpc.attempt.state.state import attempts_with_logs, read_situation
from r1hpc.base.errors import StateError
from r1hpc.base.files import GrowingFile
from r1hpc.base.run_dir import RunDir

_POLL_S = 0.3
_ASK_EVERY_S = 5.0
"""Shortest pause between checks whether the run is over; Slurm's controller serves everybody."""
_BLOCK = 65536
_ESCAPE = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.?)")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def find_log(run: RunDir, attempt: int | None, rank: int) -> Path:
    """Return the log of one rank. If it does not exist, raise StateError with those that do."""
    if attempt is None:
        raise StateError(
            f"{run.run_id} has not begun an attempt yet, so no rank has printed anything{_other(run)}"
        )
    path = run.rank_log(attempt, rank)
    if path.is_file():
        return path
    logs = (re.fullmatch(r"rank_(\d+)\.out", path.name) for path in run.attempt_logs(attempt).glob("*"))
    ranks = sorted(int(found[1]) for found in logs if found)
    if ranks:
        raise StateError(f"no log of rank {rank} in attempt {attempt}: there are ranks {_span(ranks)}")
    if run.attempt_logs(attempt).is_dir():
        raise StateError(f"no rank of attempt {attempt} has printed anything yet{_other(run)}")
    attempts = attempts_with_logs(run)
    there = (
        f"there are logs of attempts {_span(attempts)}" if attempts else f"no attempt has logs{_other(run)}"
    )
    raise StateError(f"no logs of attempt {attempt} in {run.logs}: {there}")


def tail(path: Path, count: int) -> list[bytes]:
    """Return the last `count` lines of a file, reading only its end."""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        raw = b""
        while position > 0 and raw.count(b"\n") <= count:
            step = min(_BLOCK, position)
            position -= step
            file.seek(position)
            raw = file.read(step) + raw
    return raw.removesuffix(b"\n").split(b"\n")[-count:] if raw and count else []


def clean(line: bytes) -> str:
    """Return a line as a terminal finally shows it: after the last carriage return, without escapes."""
    shown = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]
    return _CONTROL.sub("", _ESCAPE.sub(b"", shown).decode(errors="replace"))


def follow(run: RunDir, rank: int, attempt: int | None, lines: int) -> Iterator[str]:
    """Yield the last lines and all that follow, of the named attempt or else of one after the other."""
    only = attempt is not None
    current = attempt if attempt is not None else last_attempt(run)
    if only:
        find_log(run, current, rank)
    log = _from_last(run.rank_log(current, rank), lines) if current is not None else None
    asked = 0.0
    while True:
        if log is not None:
            yield from map(clean, log.lines())
        newest = current if only else last_attempt(run)
        if newest is not None and newest != current:
            if log is not None:  # lines written since the last read
                yield from map(clean, [*log.lines(), *filter(None, [log.rest()])])
            yield f"==> attempt {newest}, rank {rank} <=="
            current, log = newest, GrowingFile(run.rank_log(newest, rank))
            continue
        if time.monotonic() - asked >= _ASK_EVERY_S or run.finished.exists():
            asked = time.monotonic()
            if _is_over(run, current if only else None):
                if log is not None:  # an unfinished line too, because nothing more will follow
                    yield from map(clean, [*log.lines(), *filter(None, [log.rest()])])
                return
        time.sleep(_POLL_S)


def _from_last(path: Path, lines: int) -> GrowingFile:
    if not path.is_file():  # srun opens it a moment after the attempt began
        return GrowingFile(path)
    shown = b"\n".join(tail(path, lines))
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - 1))
        newline = log.read(1) == b"\n"  # not after a progress bar
    return GrowingFile(path, max(0, size - len(shown) - newline) if shown else size)


def wait_until_it_begins(run: RunDir) -> None:
    """Wait until a first attempt prints, or the run is over without one."""
    asked = time.monotonic()
    while not attempts_with_logs(run):
        if time.monotonic() - asked >= _ASK_EVERY_S:
            asked = time.monotonic()
            if read_situation(run).state.is_over:
                return
        time.sleep(_POLL_S)


def _is_over(run: RunDir, attempt: int | None) -> bool:
    situation = read_situation(run)
    if attempt is not None:
        return all(a.cause is not None for a in situation.history.attempts if a.attempt == attempt)
    return situation.state.is_over


def last_attempt(run: RunDir) -> int | None:
    """Return the newest attempt that has logs."""
    return max(attempts_with_logs(run), default=None)


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _other(run: RunDir) -> str:
    names = sorted(path.name for path in run.logs.glob("*.out"))
    return f"; see {run.logs / names[0]}" if names else "; see `python -m r1hpc.status`"
